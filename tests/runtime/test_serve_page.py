"""Proves the page of qvlm-serve in a real browser: choose or drop an image, ask, read the answer while it is made,
stop it, see errors, and no rule of its content policy broken: python -m pytest tests/runtime/test_serve_page.py
(needs chromium)
"""

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Page, browsing, chromium
from runtime_support import write_folder
from serve_support import Brake, png, serving, wait_for

from qvlm_runtime import Model, load
from qvlm_runtime.serve.access import Access
from qvlm_runtime.serve.app import App
from qvlm_runtime.serve.limits import Limits

pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")
pytest.importorskip("websockets", reason="the extra [dev] is not installed")
pytestmark = pytest.mark.skipif(chromium() is None, reason="no chromium is installed")

ASK = "document.getElementById('question').value = {!r}; document.getElementById('ask').click()"
TEXT = "document.getElementById({!r}).textContent"
SHOWN = "!document.getElementById({!r}).hidden"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served")
    write_folder(path / "toy", max_context=400)
    (path / "picture.png").write_bytes(png(5, (120, 80)))
    (path / "text.png").write_text("not an image")
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Model]:
    with load(folder / "toy", "rtx", threads=1, verify=False) as opened:
        yield opened


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with browsing() as opened:
        yield opened


def test_choose_an_image_ask_and_read_the_answer_while_it_is_made(
    folder: Path, model: Model, page: Page
) -> None:
    page.problems.clear()
    app = App(model, "toy")
    with serving(app) as port, Brake() as brake:
        page.open(f"http://127.0.0.1:{port}/")
        page.wait(f"{TEXT.format('model')} === 'toy'")
        page.choose("#file", folder / "picture.png")
        page.wait("document.getElementById('shown').naturalWidth === 120")
        brake.after(8)
        page.run(ASK.format("What is it?"))
        page.wait(f"{TEXT.format('answer')}.length > 2")
        partial = page.run(TEXT.format("answer"))
        assert page.run("document.getElementById('ask').disabled")
        assert app.gate.running == 1, "the answer is still being made"
        brake.off()
        page.wait(f"{TEXT.format('facts')}.includes('256 tokens')")
        expected = model.generate("What is it?", [folder / "picture.png"]).text
        whole = page.run(TEXT.format("answer"))
    assert whole == expected and expected.startswith(partial) and len(partial) < len(expected)
    assert not page.run(SHOWN.format("error")) and page.problems == []


def test_an_image_that_is_dropped_is_asked_about(folder: Path, model: Model, page: Page) -> None:
    encoded = base64.b64encode(png(6, (30, 20))).decode()
    with serving(App(model, "toy", Limits(new_tokens=6))) as port:
        page.open(f"http://127.0.0.1:{port}/")
        page.run(
            f"""(() => {{
              const bytes = Uint8Array.from(atob("{encoded}"), (c) => c.charCodeAt(0));
              const transfer = new DataTransfer();
              transfer.items.add(new File([bytes], "a.png", {{ type: "image/png" }}));
              document.getElementById("drop").dispatchEvent(
                new DragEvent("drop", {{ dataTransfer: transfer, cancelable: true }}));
            }})()"""
        )
        page.wait("document.getElementById('shown').naturalWidth === 30")
        page.run(ASK.format("And this?"))
        page.wait(f"{TEXT.format('facts')} !== ''")
        expected = model.generate("And this?", [png(6, (30, 20))], max_new_tokens=6).text
        assert page.run(TEXT.format("answer")) == expected


def test_errors_are_shown_and_the_next_question_works(
    folder: Path, model: Model, page: Page
) -> None:
    with serving(App(model, "toy", Limits(new_tokens=6))) as port:
        page.open(f"http://127.0.0.1:{port}/")
        page.choose("#file", folder / "text.png")
        page.wait("document.getElementById('hint').hidden")
        page.run(ASK.format("What is it?"))
        page.wait(f"{TEXT.format('error')}.includes('not an image in PNG')")
        assert page.run(SHOWN.format("error"))
        page.choose("#file", folder / "picture.png")
        page.wait("document.getElementById('shown').naturalWidth === 120")
        page.run(ASK.format("x" * 500))
        page.wait(f"{TEXT.format('error')}.includes('cache 400 rows')")
        page.run(ASK.format("short"))
        page.wait(f"{TEXT.format('facts')} !== ''")
        assert not page.run(SHOWN.format("error"))
    page.run(ASK.format("is anybody there?"))
    page.wait(SHOWN.format("error"))


def test_stop_ends_the_generation(model: Model, page: Page) -> None:
    app = App(model, "toy")
    with serving(app) as port, Brake() as brake:
        page.open(f"http://127.0.0.1:{port}/")
        brake.after(5)
        page.run(ASK.format("Go on"))
        page.wait(f"{TEXT.format('answer')}.length > 0")
        page.run("document.getElementById('stop').click()")
        page.wait(f"{TEXT.format('error')} === 'Stopped.'")
        brake.off()
        wait_for(lambda: app.gate.running == 0)
        assert brake.runs < 20 and app.model.budget.used == app.kept.nbytes


def test_a_server_with_a_token_asks_for_it(model: Model, page: Page) -> None:
    app = App(model, "toy", Limits(new_tokens=6), Access(token="letmein"))
    with serving(app) as port:
        page.open(f"http://127.0.0.1:{port}/")
        page.run(ASK.format("Hello"))
        page.wait(f"{TEXT.format('error')}.includes('bearer token')")
        assert page.run(SHOWN.format("token-row"))
        page.run("document.getElementById('token').value = 'letmein'")
        page.run(ASK.format("Hello"))
        page.wait(f"{TEXT.format('facts')} !== ''")


def test_an_answer_is_text_and_never_markup(model: Model, page: Page) -> None:
    """What a model writes is not trusted: a tag that arrives in one piece is shown, not built."""
    markup = "<b>bold</b><img src=x>"
    chunk = json.dumps({"choices": [{"delta": {"content": markup}}]})
    events = json.dumps(f"data: {chunk}\n\ndata: [DONE]\n\n")
    with serving(App(model, "toy")) as port:
        page.open(f"http://127.0.0.1:{port}/")
        page.run(f"window.fetch = async () => new Response({events})")
        page.run(ASK.format("Hello"))
        page.wait(f"{TEXT.format('answer')} !== ''")
        assert page.run(TEXT.format("answer")) == markup
        assert page.run("document.querySelectorAll('#answer *').length") == 0
