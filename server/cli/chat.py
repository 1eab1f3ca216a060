"""``millrace chat``: a conversation in the terminal, or one answer to what is piped in."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape

from server.cli.connection import Connection, ServerAway, ServerRefused
from server.cli.dialogue import Answer, Command, Dialogue, Phase, parse_line
from server.cli.screen import GrowingAnswer, closing_line, plain_answer

__all__ = ["Chat", "chat"]

_T = TypeVar("_T")
_PROMPT = "you> "
_HELP = """\
/new           begin a new conversation
/model [NAME]  show or choose the model
/tools on|off  let the model calculate and look at the clock, or not
/system [TEXT] show or set the system prompt; /system none removes it
/help          this list
/quit          leave (so does Ctrl-D)
Ctrl-C stops an answer. // at the start of a line sends a slash. \\ at its end goes on below."""


def chat(
    url: str,
    *,
    model: str | None,
    system: str | None,
    temperature: float | None,
    api_key: str | None,
) -> int:
    """Run the command; return its exit status: 0, 1 (no answer), 2 (no server) or 130 (Ctrl-C)."""
    dialogue = Dialogue(model=model, system=system, temperature=temperature)
    errors = Console(stderr=True, soft_wrap=True)
    with _Loop() as loop:
        try:
            return Chat(loop, Connection(url, api_key), dialogue, errors).run()
        except (ServerAway, ServerRefused, ValueError) as error:
            errors.print(f"millrace: {error}", style="red", markup=False, highlight=False)
            return 2


class _Loop:
    """An event loop in a thread of its own.

    The main thread reads lines and gets Ctrl-C; meanwhile the socket's pings are answered here.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)

    def __enter__(self) -> _Loop:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def submit(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Start ``work``."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run ``work`` to its end; Ctrl-C cancels it."""
        future = self.submit(work)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise


class Chat:
    """The conversation of one run of the command."""

    def __init__(
        self, loop: _Loop, connection: Connection, dialogue: Dialogue, errors: Console
    ) -> None:
        self._loop = loop
        self._connection = connection
        self._dialogue = dialogue
        self._errors = errors
        self._console = Console()
        self._answer: Answer | None = None
        self._commands: dict[str, Callable[[str], bool]] = {
            "new": self._new,
            "model": self._model,
            "system": self._system,
            "tools": self._tools,
            "help": self._help,
            "quit": self._quit,
            "exit": self._quit,
        }

    def run(self) -> int:
        """Talk until the person leaves; return the exit status."""
        try:
            if sys.stdin.isatty() and sys.stdout.isatty():
                return self._talk()
            return self._answer_once(sys.stdin.read())
        finally:
            self._loop.run(self._connection.close())

    def _answer_once(self, text: str) -> int:
        if not text.strip():
            self._errors.print("millrace: nothing to send: standard input is empty", style="red")
            return 2
        self._choose_model()
        to_terminal = sys.stdout.isatty()
        try:
            status = self._exchange(
                text.rstrip("\n"),
                lambda added: plain_answer(sys.stdout, added, to_terminal=to_terminal),
                lambda line: self._errors.print(line, style="dim", markup=False, highlight=False),
            )
        except KeyboardInterrupt:
            return 130
        answer = self._answer
        if answer is not None and answer.text and not answer.text.endswith("\n"):
            plain_answer(sys.stdout, "\n", to_terminal=to_terminal)
        if answer is not None and answer.problem:
            self._errors.print(f"millrace: {answer.problem}", style="red", markup=False)
        return status

    def _talk(self) -> int:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() line editing and a history)
        self._choose_model()
        self._console.print(
            f"[bold]{escape(self._dialogue.model or '')}[/]  "
            "[dim]/help for commands, Ctrl-C stops an answer, Ctrl-D leaves[/]\n",
            highlight=False,
        )
        while True:
            try:
                said = parse_line(_read_line())
            except EOFError:
                self._console.print()
                return 0
            except KeyboardInterrupt:
                self._console.print("\n[dim]Ctrl-D or /quit leaves[/]")
                continue
            if isinstance(said, Command):
                if not self._obey(said):
                    return 0
            elif said is not None:
                self._say(said)

    def _say(self, text: str) -> None:
        try:
            if self._dialogue.conversation_id is None:
                self._dialogue.conversation_id = self._loop.run(self._connection.new_conversation())
            with GrowingAnswer(self._console) as shown:
                self._connection.on_broken = shown.note
                self._exchange(text, shown.add, shown.call)
        except (ServerAway, ServerRefused) as error:
            self._console.print(f"{error}", style="red", markup=False, highlight=False)
            self._console.print("[dim]Nothing was sent; try again when it is back.[/]\n")
            return
        except KeyboardInterrupt:  # while there was no answer yet
            self._console.print("[dim]stopped[/]\n")
            return
        if self._answer is not None:
            closing_line(self._console, self._answer)
            if self._answer.problem_code == "conversation_not_found":
                self._console.print("[dim]The next question begins a new conversation.[/]\n")
                self._dialogue.conversation_id = None

    def _exchange(self, text: str, show: Callable[[str], None], tell: Callable[[str], None]) -> int:
        """Send ``text`` and show its answer; Ctrl-C stops the answer, a second one the waiting."""
        self._answer = None
        work = self._loop.submit(self._follow(text, show, tell))
        stopped = False
        while True:
            try:
                answer = work.result()
            except KeyboardInterrupt:
                response_id = self._response_id()
                if response_id is None:
                    work.cancel()
                    raise
                if stopped:
                    work.cancel()
                    return 130
                stopped = True
                self._loop.submit(self._stop(response_id))
                continue
            if stopped:
                return 130
            return 0 if answer.phase in (Phase.COMPLETED, Phase.INCOMPLETE) else 1

    async def _follow(
        self, text: str, show: Callable[[str], None], tell: Callable[[str], None]
    ) -> Answer:
        answer: Answer | None = None
        async with contextlib.aclosing(self._connection.ask(self._dialogue, text)) as steps:
            async for answer, added in steps:
                self._answer = answer
                for line in answer.take_lines():
                    tell(line)
                if added:
                    show(added)
        assert answer is not None
        return answer

    def _response_id(self) -> str | None:
        return None if self._answer is None else self._answer.response_id

    async def _stop(self, response_id: str) -> None:
        # When it cannot be stopped it goes on, and a second Ctrl-C leaves it alone.
        with contextlib.suppress(ServerAway, ServerRefused):
            await self._connection.cancel(response_id)

    def _choose_model(self) -> None:
        names = self._loop.run(self._connection.models())
        if self._dialogue.model is None and names:
            self._dialogue.model = names[0]

    def _obey(self, command: Command) -> bool:
        handler = self._commands.get(command.name)
        if handler is None:
            self._console.print(f"[red]no command /{escape(command.name)}[/]\n{_HELP}\n")
            return True
        try:
            return handler(command.argument)
        except (ServerAway, ServerRefused) as error:
            self._console.print(f"{error}", style="red", markup=False, highlight=False)
            return True

    def _new(self, _: str) -> bool:
        self._dialogue.conversation_id = None
        self._console.print("[dim]a new conversation[/]\n")
        return True

    def _model(self, name: str) -> bool:
        names = self._loop.run(self._connection.models())
        if name and name in names:
            self._dialogue.model = name
        elif name:
            self._console.print(f"[red]no model {escape(name)}[/]", highlight=False)
        for one in names:
            mark = "*" if one == self._dialogue.model else " "
            self._console.print(f"{mark} {one}", markup=False, highlight=False)
        self._console.print()
        return True

    def _system(self, text: str) -> bool:
        if text:
            self._dialogue.system = None if text == "none" else text
        shown = self._dialogue.system or "no system prompt"
        self._console.print(f"{shown}\n", style="dim", markup=False, highlight=False)
        return True

    def _tools(self, word: str) -> bool:
        if word in ("on", "off"):
            self._dialogue.tools = word == "on"
        state = "may use the server's tools" if self._dialogue.tools else "has no tools"
        self._console.print(f"the model {state}\n", style="dim", markup=False, highlight=False)
        return True

    def _help(self, _: str) -> bool:
        self._console.print(f"{_HELP}\n", style="dim", markup=False, highlight=False)
        return True

    def _quit(self, _: str) -> bool:
        return False


def _read_line() -> str:
    lines = [input(_PROMPT)]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input(" ...> "))
    return "\n".join(lines)
