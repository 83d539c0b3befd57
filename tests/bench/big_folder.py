"""A whole model folder with random weights, as large as a real one: a CLIP-L/336 tower (577 tokens), a projector and
the 1.1B Llama-shaped decoder of decode.py. For qvlm-bench, which measures folders; its answers mean nothing.

Run: python tests/bench/big_folder.py OUT [--layers 22] [--hidden 2048] [--tower-layers 24] [--float]
Takes a few minutes, about 4 GB of memory and disk for w4a16, 12 GB with --float; no network.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path

import onnx_ir as ir
from decode import HEAD, PREFIX, Shape
from decode import write_checkpoint as write_text
from vision import PREFIX as TOWER
from vision import PROJECTOR, config
from vision import write_checkpoint as write_tower

from qvlm.progress import silent
from qvlm_export.graph import GraphBuilder
from qvlm_export.models.clip import hidden_states
from qvlm_export.models.llama import decoder
from qvlm_export.ops import INT64_MAX
from qvlm_export.qdq import linear
from qvlm_export.targets import named_target
from qvlm_export.weights import Weights, write_model
from qvlm_runtime.image_spec import PixelSpec, WholeImage
from qvlm_runtime.manifest import Manifest, TargetSpec, digest

TEMPLATE = (
    "{% for m in messages %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image> {% else %}{{ p['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def write_tokenizer(path: Path, vocab: int) -> None:
    """A token a word; the last id is the image's."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    words = {f"word{i}": i for i in range(vocab - 1)} | {"<image>": vocab - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="word0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken("<image>", special=True)])
    tokenizer.save(str(path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--tower-layers", type=int, default=24)
    parser.add_argument("--float", action="store_true", help="float32 instead of w4a16")
    args = parser.parse_args()
    shape, tower = Shape.scaled(args.layers, args.hidden), config(args.tower_layers)
    # The prompt needs room behind the image: 576 tokens of 2,304.
    out, target = args.out, named_target("ort")
    (out / "ort").mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=out) as work:
        text = write_text(Path(work) / "text", shape, quantized=not args.float)
        b = GraphBuilder("decoder", target, Weights(text, target.dtype))
        decoder(b, shape.config(), PREFIX, HEAD, shape.positions, "bench")
        write_model(b.model("bench"), out / "ort/decoder.onnx", silent)
        kind = "float" if args.float else "w8a8"
        checkpoint = write_tower(Path(work) / "tower", tower, kind, projected=shape.hidden)
        b = GraphBuilder("vision", target, Weights(checkpoint, target.dtype))
        side = tower.image_size
        pixels = b.input("pixel_values", ir.DataType.FLOAT, (1, 3, side, side))
        (x,) = hidden_states(b, tower, TOWER, pixels, [tower.num_hidden_layers])
        x = b.op("Slice", x, b.i64(1), b.i64(INT64_MAX), b.i64(1))
        x = linear(b, b.op("Gelu", linear(b, x, f"{PROJECTOR}.linear_1")), f"{PROJECTOR}.linear_2")
        x = b.op("Reshape", x, b.i64(-1, shape.hidden))
        b.output(x, "image_features", ir.DataType.FLOAT, (tower.patches, shape.hidden))
        write_model(b.model("bench"), out / "ort/vision.onnx", silent)
    write_tokenizer(out / "tokenizer.json", shape.vocab)
    (out / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    model = dataclasses.replace(
        shape.spec(),
        family="llava",
        image_token="<image>",
        image_token_id=shape.vocab - 1,
    )
    pixels_spec = PixelSpec(3, 1 / 255, CLIP_MEAN, CLIP_STD)
    image = WholeImage(pixels_spec, tower.patches, ("shortest_edge", side), (side, side))
    graphs = {name: f"ort/{name}.onnx" for name in ("vision", "decoder")}
    targets = {"ort": TargetSpec(target.dtype, target.opset, target.cache, graphs)}
    files = {str(p.relative_to(out)): digest(p) for p in sorted(out.rglob("*")) if p.is_file()}
    manifest = Manifest("bench", model, image, targets, files, {"method": "random"})
    (out / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    print(out)


if __name__ == "__main__":
    main()
