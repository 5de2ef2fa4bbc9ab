"""The three steps of compare.sh: make weights and images, score by the package, score by rlgen.

Each runs in a process of its own: two ViT-H-14 in one would need twice the memory, and the package
must not be imported beside rlgen's dependencies.
"""

import json
import sys
import types
from pathlib import Path

import numpy as np
import torch

WEIGHTS = "HPS_v2.1_compressed.pt"
SEED = 14004
SIZES = ((256, 256), (200, 320), (320, 200), (96, 96), (512, 384), (224, 224))
"""Height and width. The package fails on an image whose longer side alone is 224."""
PROMPTS = ("a photo of a red fox in the snow", "An astronaut riding a horse, oil painting; 4k!")
TOLERANCE = 1e-6
"""Both compute in float32 on a CPU; a cosine's rounding is some 1e-7."""


def make(folder: Path) -> None:
    """Write rule-made weights in half precision, as the published file has them, and images."""
    from rlgen.features.open_clip_files import build_open_clip
    from rlgen.features.open_clip_published import named_config
    from rlgen.parity.rule import make_tensor

    with torch.device("meta"):
        model = build_open_clip(named_config("ViT-H-14")["model_cfg"], "ViT-H-14")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    state = {name: make_tensor(SEED, name, shape).half() for name, shape in shapes.items()}
    torch.save({"state_dict": state}, folder / WEIGHTS)
    generator = np.random.default_rng(0)
    images = {}
    for index, (height, width) in enumerate(SIZES):
        # Coarse colour fields with grain: structure at every scale, black and white included.
        coarse = generator.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3))
        field = np.kron(coarse, np.ones((16, 16, 1)))[:height, :width]
        grain = generator.normal(0, 24, (height, width, 3))
        images[str(index)] = np.clip(field + grain, 0, 255).astype(np.uint8)
    np.savez(folder / "images.npz", **images)
    print(
        f"made {len(state)} tensors, {sum(t.numel() for t in state.values())} numbers", flush=True
    )


def score_by_package(folder: Path) -> None:
    """Score with the package's own function."""
    from PIL import Image

    try:
        import turtle  # noqa: F401
    except ImportError:  # its factory.py imports a name of turtle's, unused; that needs Tk
        sys.modules["turtle"] = types.ModuleType("turtle")
        sys.modules["turtle"].forward = None  # type: ignore[attr-defined]
    from hpsv2 import img_score

    # What img_score.initialize_model does, but without the download of LAION's weights, which
    # score() overwrites with the checkpoint's.
    model, _, preprocess = img_score.create_model_and_transforms(
        "ViT-H-14",
        None,
        precision="amp",
        device=img_score.device,
        force_patch_dropout=False,
        light_augmentation=True,
        aug_cfg={},
        output_dict=True,
    )
    img_score.model_dict.update(model=model, preprocess_val=preprocess)
    images = [Image.fromarray(image) for image in read_images(folder)]
    scores = [
        [float(s) for s in img_score.score(images, prompt, cp=str(folder / WEIGHTS))]
        for prompt in PROMPTS
    ]
    (folder / "package.json").write_text(json.dumps(scores))


def score_by_rlgen(folder: Path) -> int:
    """Score with rlgen, print both and return the exit status."""
    from rlgen.rewards.hpsv2 import load_hps_scorer

    scorer = load_hps_scorer(str(folder / WEIGHTS), "cuda" if torch.cuda.is_available() else "cpu")
    expected = np.array(json.loads((folder / "package.json").read_text())).T
    rows = []
    for image in read_images(folder):
        images_01 = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
        repeated = images_01.expand(len(PROMPTS), -1, -1, -1).to(next(scorer.model.parameters()))
        rows.append(scorer(repeated, PROMPTS, torch.zeros(len(PROMPTS))).cpu().numpy())
    found = np.array(rows)
    print("image      prompt  hpsv2        rlgen        difference")
    for index, (height, width) in enumerate(SIZES):
        for prompt in range(len(PROMPTS)):
            package, ours = expected[index, prompt], found[index, prompt]
            size = f"{height}x{width}"
            print(f"{size:<10} {prompt:<6} {package:+.8f}  {ours:+.8f}  {ours - package:+.1e}")
    largest = float(np.abs(found - expected).max())
    spread = float(expected.std())
    verdict = "pass" if largest <= TOLERANCE else "FAIL"
    print(
        f"{verdict}: largest deviation {largest:.2e} of {TOLERANCE:g}; scores spread {spread:.2e}"
    )
    return 0 if largest <= TOLERANCE else 1


def read_images(folder: Path) -> list[np.ndarray]:
    """uint8 [H, W, 3] each."""
    with np.load(folder / "images.npz") as archive:
        return [archive[str(index)] for index in range(len(SIZES))]


if __name__ == "__main__":
    step, where = sys.argv[1], Path(sys.argv[2])
    steps = {"make": make, "package": score_by_package, "rlgen": score_by_rlgen}
    sys.exit(steps[step](where) or 0)
