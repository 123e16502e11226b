"""A Llama checkpoint folder (config.json, model.safetensors, tokenizer.json) as a float32 OpenVINO model with its tokenizer.

    python convert_openvino.py FOLDER OUT

Needs torch, safetensors, optimum-intel and openvino-tokenizers. The weights are widened to float32 before the export, which
would otherwise keep the type on disk. The tokenizer is converted because GenAI asks for one; prompts of the benchmark are
token ids.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path


class CannotConvert(ValueError):
    """What came out is not what was asked for."""


def convert(folder: Path, out: Path) -> None:
    """Read the checkpoint in `folder`, write the model into `out`."""
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig

    with tempfile.TemporaryDirectory() as wide:
        widen(folder, Path(wide))
        main_export(
            wide, str(out), task="text-generation-with-past", stateful=True, ov_config=OVConfig(dtype="fp32"),
            convert_tokenizer=True,
        )  # fmt: skip
    check(out)


def widen(folder: Path, wide: Path) -> None:
    """The same checkpoint with every weight in float32."""
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.json"):
        shutil.copy(file, wide)
    state = {name: tensor.float().contiguous() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(state, wide / "model.safetensors", {"format": "pt"})


def check(out: Path) -> None:
    """Every matrix is float32, and the KV is inside the model."""
    import openvino

    model = openvino.Core().read_model(out / "openvino_model.xml")
    constants = [op.output(0) for op in model.get_ops() if op.get_type_name() == "Constant"]
    types = {output.get_element_type().get_type_name() for output in constants if len(output.get_shape()) == 2}
    if types != {"f32"}:
        raise CannotConvert(f"matrices were written as {', '.join(sorted(types))}, not as f32")
    if not model.get_sinks():
        raise CannotConvert("the model has no state: its KV would have to travel in and out at every step")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="config.json, model.safetensors and tokenizer.json")
    parser.add_argument("out", type=Path, help="the folder to write")
    chosen = parser.parse_args()
    try:
        convert(chosen.folder, chosen.out)
    except (CannotConvert, OSError) as error:
        raise SystemExit(f"not converted: {error}") from error
    print(f"{chosen.out}: {(chosen.out / 'openvino_model.bin').stat().st_size:,} bytes of weights, float32")


if __name__ == "__main__":
    main()
