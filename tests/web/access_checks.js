// What can be checked on any page without knowing it. Returns the offenders of each rule.
() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const textOf = (ids) => (ids ?? "").split(" ").map((id) => document.getElementById(id)?.textContent ?? "").join("");

  const NAMED =
    "button, a[href], input, select, textarea, summary, nav, aside, dialog[open], [role=region], [role=log]";
  const WITHOUT_TEXT = /^(INPUT|SELECT|TEXTAREA|DIALOG|NAV|ASIDE|DIV|PRE)$/;
  const nameOf = (element) =>
    element.getAttribute("aria-label") ||
    textOf(element.getAttribute("aria-labelledby")) ||
    [...(element.labels ?? [])].map((label) => label.textContent).join("") ||
    (WITHOUT_TEXT.test(element.tagName) ? "" : element.textContent.trim());
  const nameless = all(NAMED).filter((element) => element.closest("[aria-hidden=true]") === null && !nameOf(element));

  const ids = all("[id]").map(({ id }) => id);
  const duplicateIds = ids.filter((id, at) => ids.indexOf(id) !== at);

  const danglingReferences = all("[aria-describedby], [aria-labelledby], label[for]")
    .flatMap((element) => ["aria-describedby", "aria-labelledby", "for"].map((name) => element.getAttribute(name)))
    .flatMap((value) => (value ?? "").split(" "))
    .filter((id) => id !== "" && document.getElementById(id) === null);

  // WCAG 2.2, 2.5.8: targets of at least 24 by 24 pixels, links in text excepted.
  const smallTargets = all("button, input, select, textarea, summary").filter((element) => {
    const { width, height } = element.getBoundingClientRect();
    return element.checkVisibility() && width > 0 && (width < 24 || height < 24);
  });

  // WCAG 2.2, 1.4.3: 4.5 to 1, or 3 to 1 from 24 pixels on. Backgrounds are plain colours here.
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].map((value) => value / 255);
  };
  const over = ([r, g, b, a], [x, y, z]) => [r * a + x * (1 - a), g * a + y * (1 - a), b * a + z * (1 - a), 1];
  const behind = (element) => {
    const layers = [];
    for (let at = element; at !== null; at = at.parentElement) {
      layers.push(rgba(getComputedStyle(at).backgroundColor));
      // A dialog stands in the top layer, not on its parents.
      if (at.tagName === "DIALOG") break;
    }
    return layers.reduceRight((below, layer) => over(layer, below), [1, 1, 1, 1]);
  };
  const linear = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const ratioOf = (element) => {
    const back = behind(element);
    const lights = [luminance(over(rgba(getComputedStyle(element).color), back)), luminance(back)];
    return (Math.max(...lights) + 0.05) / (Math.min(...lights) + 0.05);
  };
  const lowContrast = all("body *").filter((element) => {
    const text = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim() !== "");
    if (!text || element.closest(".sr-only, :disabled") || !element.checkVisibility({ opacityProperty: true })) return false;
    return ratioOf(element) < (parseFloat(getComputedStyle(element).fontSize) >= 24 ? 3 : 4.5);
  });

  const show = (elements) => elements.map((element) => (element.outerHTML ?? element).slice(0, 160));
  return {
    nameless: show(nameless),
    duplicateIds,
    danglingReferences,
    smallTargets: show(smallTargets),
    lowContrast: show(lowContrast).map((html, at) => `${ratioOf(lowContrast[at]).toFixed(2)} ${html}`),
  };
};
