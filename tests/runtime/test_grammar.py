"""Proves that answers under a JSON schema are valid documents of it, whatever the model prefers:
python -m pytest tests/runtime/test_grammar.py (needs the extra [json])
"""

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runtime_support import EOS, write_byte_tokenizer, write_folder

from qvlm_runtime import Model, Options, PromptError, SessionError, load
from qvlm_runtime.grammar import JsonGrammars
from qvlm_runtime.sample import Sampling
from qvlm_runtime.tokenizer import Tokenizer

pytest.importorskip("llguidance", reason="the extra [json] is not installed")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "open": {"type": "boolean"},
        "colour": {"enum": ["red", "green"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["open", "colour", "count"],
    "additionalProperties": False,
}


def check(text: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(text)
    assert list(value) == ["open", "colour", "count"]
    assert type(value["open"]) is bool and value["colour"] in ("red", "green")
    assert type(value["count"]) is int and 0 <= value["count"] <= 99
    return value


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = tmp_path_factory.mktemp("model")
    write_folder(path, max_context=160)
    with load(path, "rtx", threads=1, verify=False) as opened:
        yield opened


@pytest.fixture
def grammars(tmp_path: Path) -> JsonGrammars:
    write_byte_tokenizer(tmp_path / "tokenizer.json")
    return JsonGrammars(Tokenizer(tmp_path / "tokenizer.json"), 260, [EOS])


@pytest.mark.parametrize("options", [{}, *({"temperature": 3.0, "seed": n} for n in range(8))])
def test_every_answer_is_a_document_of_the_schema(model: Model, options: dict[str, Any]) -> None:
    free = model.generate("What?", max_new_tokens=80, **options)
    with pytest.raises(ValueError, match=r".*"):
        json.loads(free.text)
    done = model.generate("What?", max_new_tokens=80, json_schema=SCHEMA, **options)
    assert done.finish == "stop" and done.token_ids[-1] == EOS
    check(done.text)


def test_sampled_documents_differ(model: Model) -> None:
    texts = {
        model.generate("What?", json_schema=SCHEMA, temperature=5.0, seed=n, max_new_tokens=80).text
        for n in range(8)
    }
    assert len({check(text)["colour"] for text in texts}) == 2 and len(texts) > 4


def test_threads_have_their_own_position(model: Model) -> None:
    def ask(n: int) -> str:
        return model.generate(
            "a" * n, json_schema=SCHEMA, temperature=4.0, seed=n, max_new_tokens=80
        ).text

    serial = [ask(n) for n in range(8)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(8))) == serial


def test_a_limit_cuts_a_document_and_says_so(model: Model) -> None:
    done = model.generate("What?", max_new_tokens=9, json_schema=SCHEMA)
    assert done.finish == "length" and done.text == '{"open": '


def test_the_schema_may_be_text_and_works_with_a_conversation(model: Model) -> None:
    with model.conversation() as talk:
        check(talk.ask("a", json_schema=json.dumps(SCHEMA), max_new_tokens=60).text)
        check(talk.ask("b", json_schema=SCHEMA, max_new_tokens=60).text)


def test_the_mask_is_what_may_come_next(grammars: JsonGrammars) -> None:
    """{"a": then a digit: each step allows exactly the bytes of the one document of this schema."""
    constraint = grammars.constraint({"const": {"a": 1}})
    allowed = []
    for byte in b'{"a": 1}':
        logits = np.zeros(260, np.float32)
        constraint.mask(logits)
        allowed.append(np.flatnonzero(np.isfinite(logits)).tolist())
        constraint.accept(4 + byte)
    assert allowed == [[4 + byte] for byte in b'{"a": 1}']
    logits = np.zeros(260, np.float32)
    constraint.mask(logits)
    assert np.flatnonzero(np.isfinite(logits)).tolist() == [EOS]


def test_a_token_that_was_forced_in_is_an_error(grammars: JsonGrammars) -> None:
    constraint = grammars.constraint({"type": "boolean"})
    with pytest.raises(PromptError, match="json_schema: "):
        constraint.accept(4 + ord("x"))


def test_the_constraint_is_applied_behind_bias_and_penalties(grammars: JsonGrammars) -> None:
    rules = Sampling(logit_bias={4 + ord("x"): 1e4}, presence_penalty=0.5)
    choose = rules.chooser((), grammars.constraint({"const": "ab"}))
    logits = np.zeros(260, np.float32)
    assert bytes(choose(logits) - 4 for _ in range(4)) == b'"ab"'


@pytest.mark.parametrize(
    "schema", ["{", "[1]", {"type": "nothing"}, {"type": "object", "properties": 3}, {1: object()}]
)
def test_what_is_no_schema_is_refused_in_one_line(model: Model, schema: Any) -> None:
    with pytest.raises(PromptError, match="json_schema: ") as caught:
        model.stream("a", json_schema=schema)
    assert "\n" not in str(caught.value)


def test_without_llguidance_the_extra_is_named(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(SessionError, match=r"llguidance is not installed .* 'qvlm\[json\]'"):
        model.stream("a", json_schema=SCHEMA)


def test_options_and_their_keyword_arguments_are_the_same_names() -> None:
    from dataclasses import fields

    from qvlm_runtime.options import OptionArguments

    assert [f.name for f in fields(Options)] == list(OptionArguments.__annotations__)
