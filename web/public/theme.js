// Before the first paint, so that a chosen theme never flashes.
try {
  const theme = JSON.parse(localStorage.getItem("millrace.theme"));
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Storage is forbidden or holds something else: the system's choice stands.
}
