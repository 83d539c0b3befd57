"""Proves that results of llama-bench and TensorRT-Edge-LLM are read as they write them, and that
nothing else is taken for one: python -m pytest tests/runtime/bench/test_foreign.py
"""

import json
from pathlib import Path

import pytest

from qvlm_runtime.bench.foreign import Foreign, Rate, read_foreign
from qvlm_runtime.errors import PromptError

COMMON = {
    "build_commit": "8cf427ff",
    "cpu_info": "AMD EPYC",
    "backends": "CPU",
    "model_type": "llama 1B Q4_0",
    "model_size": 636000000,
    "n_threads": 2,
    "type_k": "f16",
}
ROWS = [
    {**COMMON, "n_prompt": 512, "n_gen": 0, "n_depth": 0, "avg_ts": 71.5, "stddev_ts": 1.25},
    {**COMMON, "n_prompt": 0, "n_gen": 128, "n_depth": 0, "avg_ts": 12.5, "stddev_ts": 0.5},
    {**COMMON, "n_prompt": 0, "n_gen": 128, "n_depth": 512, "avg_ts": 11.5, "stddev_ts": 0.25},
    {**COMMON, "n_prompt": 512, "n_gen": 128, "n_depth": 0, "avg_ts": 30.0, "stddev_ts": 0.5},
]
LLAMA = Foreign(
    "llama-bench",
    "llama 1B Q4_0, CPU, 2 threads",
    (Rate(0, 12.5, 0.5), Rate(512, 11.5, 0.25)),
    (Rate(512, 71.5, 1.25),),
)


def as_csv(rows: list[dict]) -> str:
    lines = [",".join(rows[0])]
    return "\n".join(lines + [",".join(f'"{v}"' for v in row.values()) for row in rows]) + "\n"


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ROWS, indent=2),
        "\n".join(map(json.dumps, ROWS)),
        as_csv(ROWS),
    ],
    ids=["json", "jsonl", "csv"],
)
def test_llama_bench_in_each_of_its_forms(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.txt"
    path.write_text(text)
    assert read_foreign(path) == [LLAMA]


def test_one_line_of_jsonl_and_rows_of_an_older_schema_are_read(tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    old = {k: v for k, v in ROWS[1].items() if k != "n_depth"}
    path.write_text(json.dumps(old))
    assert read_foreign(path)[0].decode == (Rate(0, 12.5, 0.5),)


def test_edge_llm_profile(tmp_path: Path) -> None:
    profile = {
        "prefill": {"total_runs": 4, "computed_tokens": 1180, "average_tokens_per_run": 295.0}
        | {"average_time_per_run_ms": 190.9, "tokens_per_second": 1545.3},
        "generation": {"total_runs": 4, "generated_tokens": 512, "tokens_per_second": 36.9},
        "multimodal": {"total_runs": 4, "total_images": 4, "total_image_tokens": 1060},
        "stages": [
            {"stage_id": "vision_encoder", "total_runs": 4, "average_time_per_run_ms": 151.1},
            {"stage_id": "llm_prefill", "total_runs": 4, "average_time_per_run_ms": 190.9},
        ],
        "peak_unified_memory_bytes": 4592762880,
    }
    path = tmp_path / "orin-nano.json"
    path.write_text(json.dumps(profile))
    (one,) = read_foreign(path)
    assert (one.tool, one.name, one.peak_bytes) == ("TensorRT-Edge-LLM", "orin-nano", 4592762880)
    assert one.decode == (Rate(295, 36.9),) and one.prefill == (Rate(295, 1545.3),)
    assert one.first_token == pytest.approx({"prefill": 0.1909, "vision": 0.1511})


def test_edge_llm_bench_rows(tmp_path: Path) -> None:
    head = "mode,batch_size,osl,e2e_time_ms,per_token_ms,throughput_tps"
    path = tmp_path / "e2e_decode_pastkvlen128.csv"
    path.write_text(f"{head},past_kv_len\ndecode,1,2,27.1000,27.1000,36.9004,128\n")
    assert read_foreign(path)[0].decode == (Rate(128, 36.9004),)
    path.write_text(f"{head},input_len\nprefill,1,1,30.5000,0.0149,67147.5410,2048\n")
    (one,) = read_foreign(path)
    assert one.prefill == (Rate(2048, 67147.5410),)
    assert one.first_token == pytest.approx({"prefill": 0.0305})
    path.write_text(
        f"{head},image_height,image_width,image_tokens\nvisual,1,1,11.7,11.7,85.4,448,448,256\n"
    )
    assert read_foreign(path)[0].first_token == pytest.approx({"vision": 0.0117})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no result in it"),
        ("{}", "no result in it"),
        ("a,b\n1,2\n", "no result in it"),
        (json.dumps(ROWS[3:]), "no result in it"),
        ('[{"avg_ts": 1}]', "lacks 'model_type'"),
        ("[1, 2]", "a result lacks"),
        ("{broken", "a result lacks"),
    ],
)
def test_anything_else_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows"
    path.write_text(text)
    with pytest.raises(PromptError, match=message) as caught:
        read_foreign(path)
    assert "\n" not in str(caught.value)
