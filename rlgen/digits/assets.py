"""The embedded default's files: trained once, cached under a content key, reused after.

Owns the cache and which file is what. The key covers the settings and the code that the files
depend on, so that neither can change behind a cached file.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch

from rlgen.config.base import EMBEDDED
from rlgen.config.digits import DigitsConfig
from rlgen.config.reward import PythonRewardConfig
from rlgen.config.run import RunConfig
from rlgen.digits.data import CLASS_NAMES, DigitsData, load_digits_data
from rlgen.digits.styles import STYLES, in_all_styles, in_style
from rlgen.digits.train_clip import train_clip
from rlgen.digits.train_features import train_feature_net, train_judge, train_style_judge
from rlgen.digits.train_policy import train_policy
from rlgen.digits.train_preference import train_preference
from rlgen.digits.train_tokenizer import train_multiscale_tokenizer, train_tokenizer
from rlgen.evaluation.judge import save_real_features
from rlgen.features.extractor import ConvNetExtractor, save_convnet
from rlgen.moments.classes import class_means
from rlgen.moments.moments import batch_moments
from rlgen.moments.reference import ReferenceMoments, save_reference
from rlgen.policies.load import save_policy
from rlgen.rewards.open_clip_model import save_open_clip
from rlgen.storage import cache_root
from rlgen.tokenizers.load import load_tokenizer, save_tokenizer

Report = Callable[[str, int, int], None]
"""Called with what is trained, and the steps done and in all."""

_CODE = ("digits", "tokenizers", "features", "policies", "nn", "moments", "rewards/open_clip_model")
_POLICY_FIELDS = (
    "family",
    "policy_seed",
    "policy_width",
    "policy_layers",
    "policy_heads",
    "policy_steps",
    "class_dropout",
)
_SCORER_FOLDERS = {"clip": "clip", "hpsv2": "preference"}
_STYLE_JUDGE = "rlgen.digits.style_judge:StyleJudge"
_NUM_NEIGHBORS = 1000


@dataclass(frozen=True)
class DigitsAssets:
    """Where the files are."""

    folder: Path
    """What all families share: nets, references, and the single-scale tokenizer."""
    tokenizer: Path
    """The policy's tokenizer; VAR's is a file of its own."""
    policy: Path

    @property
    def exist(self) -> bool:
        """Whether all parts were trained."""
        return self.tokenizer.is_file() and self.policy.is_file()


def locate_assets(config: DigitsConfig) -> DigitsAssets:
    """Name the files of a configuration; they may not exist yet."""
    settings = config.model_dump(mode="json")
    # One folder serves all styles; without styles it is as if there were no such setting.
    if settings.pop("style") is not None:
        settings["styles"] = STYLES
    policy_settings = {name: settings.pop(name) for name in _POLICY_FIELDS}
    code = _code_version()
    folder = cache_root() / f"digits-{_key(settings, code)}"
    single_scale, multi_scale = "tokenizer.safetensors", "multiscale_tokenizer.safetensors"
    return DigitsAssets(
        folder=folder,
        tokenizer=folder / (multi_scale if config.family == "var" else single_scale),
        policy=folder / f"policy-{_key(policy_settings, code)}.safetensors",
    )


def ensure_assets(config: DigitsConfig, report: Report) -> DigitsAssets:
    """Train what the cache lacks; a folder or file appears complete or not at all."""
    assets = locate_assets(config)
    if assets.exist:
        return assets
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these nets are too small for more, and the result depends on it
    try:
        plain = load_digits_data(config)
        data = plain if config.style is None else in_all_styles(plain)
        if not assets.folder.is_dir():
            _train_folder(assets.folder, data, config, report)
        if not assets.tokenizer.is_file():
            save_tokenizer(
                str(assets.tokenizer),
                train_multiscale_tokenizer(
                    data, config, on_step=_named(report, "multi-scale tokenizer")
                ),
            )
        if not assets.policy.is_file():
            tokenizer = load_tokenizer(str(assets.tokenizer), device=torch.device("cpu"))
            policy = train_policy(
                plain, tokenizer, config, on_step=lambda *steps: report("base policy", *steps)
            )
            save_policy(str(assets.policy), policy)
    finally:
        torch.set_num_threads(threads)
    return assets


def resolve_embedded(config: RunConfig, assets: DigitsAssets) -> RunConfig:
    """Put the files' paths in place of the word `embedded`."""
    folder, style = assets.folder, config.digits.style
    paths = {
        "policy.checkpoint": assets.policy,
        "tokenizer.checkpoint": assets.tokenizer,
        "reward.loo_fid.extractor": folder / "features.safetensors",
        "reward.loo_fid.reference": folder / reference_name(style),
        "evaluation.judge": folder / "judge.safetensors",
        "evaluation.judge_reference": folder / judge_reference_name(style),
    }
    for name, scorer in config.reward.active_scorers.items():
        if scorer.type in _SCORER_FOLDERS:
            paths[f"reward.scorers.{name}.checkpoint"] = folder / _SCORER_FOLDERS[scorer.type]
        elif isinstance(scorer, PythonRewardConfig) and scorer.target == _STYLE_JUDGE:
            paths[f"reward.scorers.{name}.arguments.net"] = folder / "style_judge.safetensors"
    # What a user's scorer calls `embedded` among its arguments is its own affair.
    wanted = [key for key in config.keys_with(EMBEDDED) if key in paths]
    return config.with_values({key: str(paths[key]) for key in wanted})


def _train_folder(folder: Path, data: DigitsData, config: DigitsConfig, report: Report) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        tokenizer = train_tokenizer(data, config, on_step=_named(report, "tokenizer"))
        save_tokenizer(str(partial / "tokenizer.safetensors"), tokenizer)
        net = train_feature_net(data, config, on_step=_named(report, "feature net"))
        save_convnet(str(partial / "features.safetensors"), net)
        judge = train_judge(data, config, on_step=_named(report, "judge"))
        save_convnet(str(partial / "judge.safetensors"), judge)
        clip, clip_config = train_clip(data, config, on_step=_named(report, "CLIP"))
        save_open_clip(str(partial / "clip"), clip, clip_config)
        preference = train_preference(
            data, clip, clip_config, tokenizer, config, on_step=_named(report, "preference")
        )
        save_open_clip(str(partial / "preference"), preference, clip_config)
        nets = ConvNetExtractor(net), ConvNetExtractor(judge)
        if config.style is None:
            _save_references(partial, data, *nets, config, style=None)
        else:
            style_judge = train_style_judge(data, config, on_step=_named(report, "style judge"))
            save_convnet(str(partial / "style_judge.safetensors"), style_judge)
            for style in STYLES:
                part = DigitsData(in_style(data.train, style), in_style(data.heldout, style))
                _save_references(partial, part, *nets, config, style=style)
        try:
            os.replace(partial, folder)
        except OSError:
            if not folder.is_dir():  # another process was faster: its files are the same
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def reference_name(style: str | None) -> str:
    """File of the reward's reference moments: real digits of the style."""
    return "reference_moments.npz" if style is None else f"reference_moments-{style}.npz"


def judge_reference_name(style: str | None) -> str:
    """File of the judge's features of real digits of the style."""
    return "judge_reference.npz" if style is None else f"judge_reference-{style}.npz"


def _named(report: Report, name: str) -> Callable[[int, int], None]:
    return lambda done, total: report(name, done, total)


def _save_references(
    folder: Path,
    data: DigitsData,
    extractor: ConvNetExtractor,
    judge: ConvNetExtractor,
    config: DigitsConfig,
    *,
    style: str | None,
) -> None:
    """Reward: moments of training digits. Judge: held-out digits and as many training ones."""
    features_NF = extractor(data.train.images_rgb_01)
    moments = batch_moments(features_NF)
    save_reference(
        folder / reference_name(style),
        ReferenceMoments(
            feature_space=extractor.feature_space,
            count=int(moments.count),
            mean_F=moments.mean_F,
            cov_FF=moments.cov_FF,
            preprocessing=f"gray, {config.image_size} px, values in [0, 1]",
            classes=class_means(features_NF, data.train.labels_N, CLASS_NAMES),
        ),
    )
    heldout = judge(data.heldout.images_rgb_01)
    generator = torch.Generator().manual_seed(config.seed)
    chosen = torch.randperm(len(data.train.labels_N), generator=generator)[: len(heldout)]
    training = judge(data.train.images_rgb_01[chosen])
    real = torch.cat([heldout, training])
    subset = torch.randperm(len(real), generator=generator)[:_NUM_NEIGHBORS]
    save_real_features(
        str(folder / judge_reference_name(style)),
        feature_space=judge.feature_space,
        features_RF=real,
        neighbors_NF=real[subset],
    )


def _code_version() -> str:
    """Digest of the source files that the trained files depend on."""
    root = resources.files("rlgen")
    digest = hashlib.sha256()
    for name in _CODE:
        place = Path(str(root.joinpath(name)))
        files = sorted(place.glob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
        for file in files:
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _key(settings: dict[str, object], code: str) -> str:
    content = json.dumps([settings, code], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
