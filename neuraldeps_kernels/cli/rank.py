"""`neuraldeps rank`: how a network loses rank layer by layer, for real ImageNet networks or those of the package, and
which few categories decide the confidence in each (independence deficit), for these or for logits in a file."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from neuraldeps_kernels.analysis.formatting import json_text
from neuraldeps_kernels.analysis.independence_deficit import (
    AUTHORS_LAM,
    OUR_LAM_RATIO,
    IndependenceDeficit,
    independence_deficit,
)
from neuraldeps_kernels.analysis.network_layers import measuring
from neuraldeps_kernels.analysis.rank_profile import CANVASES, MEASURES, RankProfile, rank_profile
from neuraldeps_kernels.cli import options as o
from neuraldeps_kernels.cli.output import check_output, console, messages, output_folder
from neuraldeps_kernels.data.logits import imagenet_class_names, read_logits
from neuraldeps_kernels.models.backbones import SIZE, backbone
from neuraldeps_kernels.progress import track

DEFAULT_NETWORK = "efficientnet-lite0"
DEFICIT = "deficit"
_BATCH = 32  # inputs a forward pass when logits are collected


class Model(str, Enum):
    """Networks of the package."""

    MLP = "mlp"
    RESNET = "resnet"
    VIT = "vit"


def rank(
    network: Annotated[
        str | None,
        typer.Option(help="Real network: efficientnet-lite0 (default), -lite1 or -lite2.", show_default=False),
    ] = None,
    model: Annotated[
        Model | None, typer.Option(help="Instead: a network of the package, its weights drawn from --seed.")
    ] = None,
    logits: Annotated[
        Path | None,
        typer.Option(help="Instead: logits of any network, for the deficit alone."),
    ] = None,
    labels: o.Labels = None,
    class_names: Annotated[Path | None, typer.Option(help="Text file, one name a category of --logits.")] = None,
    measures: Annotated[str | None, typer.Option(help="What to measure, with commas.", show_default=False)] = None,
    layers: Annotated[
        str | None, typer.Option(help="Module names with commas, or output; default: the chain of blocks.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Inputs of the Jacobian and of the PCA.")] = 2,
    patch: Annotated[int, typer.Option(min=1, help="Side of the central square of the Jacobian, pixels.")] = 8,
    canvas: Annotated[
        str, typer.Option(help="Around the square: zero, or the rest of the image.", metavar="zero|image")
    ] = CANVASES[0],
    perturbations: Annotated[int, typer.Option(min=2, help="Noisy copies of each input for the PCA.")] = 500,
    perturb: Annotated[
        str,
        typer.Option(
            help="Noise on the patch alone, or on all pixels, which takes thousands of copies.", metavar="patch|all"
        ),
    ] = "patch",
    noise: Annotated[float, typer.Option(help="Standard deviation of that noise.")] = 1e-3,
    samples: Annotated[
        int, typer.Option(min=2, help="Inputs of the classification dimension and the deficit: crops of the pictures.")
    ] = 200,
    pictures: Annotated[
        Path | None, typer.Option(help="Folder of pictures; default: installed ones, or noise with --model.")
    ] = None,
    memory: Annotated[
        int, typer.Option(min=1, help="MiB of features held at once; less runs the network more.")
    ] = 1024,
    seed: Annotated[int, typer.Option(help="Of random weights, noise inputs and perturbations.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for rank.json, tables in CSV and plots.")] = None,
    force: o.Force = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the profile as JSON instead of a table.")] = False,
) -> None:
    """How a network loses rank layer by layer, and which few other categories decide each logit.

    Measures: jacobian, pca, classification (dimension), deficit (of independence, at the authors' penalty and at ours);
    default all.
    """
    check_output(out, force)
    sources = {"--network": network, "--model": model, "--logits": logits}
    given = [name for name, value in sources.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"{given[0]} and {given[1]} must not both be given")
    chosen = _measures(measures, (DEFICIT,) if logits is not None else (*MEASURES, DEFICIT))
    if logits is not None:
        values = read_logits(logits)
        names = o.read_names(class_names, values.shape[1], "class name")
        deficits = _deficits(values, o.read_labels(labels, len(values)), names)
        _report(None, deficits, {"network": str(logits), "inputs": f"{len(values)} samples"}, out, force, as_json)
        return
    if labels is not None or class_names is not None:
        raise ValueError("--labels and --class-names need --logits")
    number = max(images, samples if "classification" in chosen or DEFICIT in chosen else 0)
    if model is None:
        name, net, size = _real_network(DEFAULT_NETWORK if network is None else network)
        inputs, source = _picture_inputs(pictures, size, number)
    else:
        name, net = f"{model.value} with random weights", backbone(model.value, seed=seed)
        inputs, source = _noise_inputs(number, seed) if pictures is None else _picture_inputs(pictures, SIZE, number)
    by_layer = [measure for measure in chosen if measure != DEFICIT]
    profile = None
    if by_layer:
        profile = rank_profile(
            net,
            inputs,
            None if layers is None else layers.split(","),
            by_layer,
            patch=patch,
            canvas=canvas,
            jacobian_inputs=images,
            pca_inputs=images,
            perturbations=perturbations,
            perturb=perturb,
            noise=noise,
            memory=memory << 20,
            seed=seed,
            network=name,
        )
    deficits = {}
    if DEFICIT in chosen:
        found = _forward(net, inputs)
        deficits = _deficits(found, None, imagenet_class_names() if model is None else None)
    _report(profile, deficits, {"network": name, "inputs": source}, out, force, as_json)


def _measures(text: str | None, allowed: tuple[str, ...]) -> list[str]:
    chosen = list(allowed) if text is None else text.split(",")
    if any(measure not in allowed for measure in chosen):
        raise ValueError(f"measures must be some of {', '.join(allowed)}, got {text!r}")
    return chosen


def _forward(net: nn.Module, inputs: Tensor) -> Tensor:
    """Logits [N, n] in full float32."""
    with measuring(net, inputs):
        return torch.cat([net(part) for part in inputs.split(_BATCH)])


def _deficits(logits: Tensor, labels: Tensor | None, names: Sequence[str] | None) -> dict[str, IndependenceDeficit]:
    """With the authors' settings, and with the penalty that does not depend on the scale of the logits."""
    return {
        "authors": independence_deficit(logits, labels, lam=AUTHORS_LAM, class_names=names),
        "ours": independence_deficit(logits, labels, lam_ratio=OUR_LAM_RATIO, class_names=names),
    }


def _report(
    profile: RankProfile | None,
    deficits: dict[str, IndependenceDeficit],
    source: dict[str, str],
    out: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Tables or JSON on standard output, files in `out`, cautions among the messages."""
    content: dict[str, Any] = ({} if profile is None else profile.to_dict()) | source
    if deficits:
        content["independence_deficit"] = {name: found.to_dict() for name, found in deficits.items()}
    if out is not None:
        with output_folder(out, force) as folder:
            _write(profile, deficits, content, folder)
        messages().print(f"wrote {out}", soft_wrap=True)
    cautions = [] if profile is None else profile.cautions()
    cautions += [caution for found in deficits.values() for caution in found.cautions()]
    for caution in dict.fromkeys(cautions):
        messages().print(f"[yellow]{caution}[/]")
    if as_json:
        typer.echo(json_text(content), nl=False)
        return
    if profile is not None:
        console().print(profile.table())
    for name, found in deficits.items():
        console().print(f"[bold]Independence deficit, settings: {name}[/]")
        console().print(found.table())


def _write(
    profile: RankProfile | None, deficits: dict[str, IndependenceDeficit], content: dict[str, Any], folder: Path
) -> None:
    (folder / "rank.json").write_text(json_text(content), encoding="utf-8")
    if profile is not None:
        profile.to_csv(folder / "rank.csv")
        profile.plot(folder / "rank.png")
    for name, found in deficits.items():
        found.to_csv(folder / f"deficit_{name}.csv")
    if deficits:
        from neuraldeps_kernels.analysis import rank_plots

        rank_plots.deficits(deficits).savefig(folder / "deficit.png", dpi=rank_plots.DPI)


def _real_network(name: str) -> tuple[str, nn.Module, int]:
    """Its name, the network and the side of its input."""
    _check_pillow()
    from neuraldeps_kernels.data.networks import load_network

    loaded = load_network(name)
    return name, loaded.model, loaded.size


def _picture_inputs(folder: Path | None, size: int, number: int) -> tuple[Tensor, str]:
    """[number, 3, size, size]: the central crops of all pictures, then further crops of each; and what they are."""
    _check_pillow()
    from neuraldeps_kernels.data.pictures import crops, folder_pictures, packaged_pictures

    pictures = packaged_pictures() if folder is None else folder_pictures(folder)
    if not pictures:
        where = "the installed packages have" if folder is None else f"{folder} has"
        raise ValueError(f"{where} no pictures; give --pictures FOLDER")
    each = -(-number // len(pictures))
    views: list[list[Tensor]] = []
    for picture in track(pictures[:number], "pictures", min(number, len(pictures))):
        try:
            views.append([view for (view,) in crops(picture, each, [size])])
        except ValueError as error:
            messages().print(f"skipped {error}", soft_wrap=True, markup=False)
    if not views:
        raise ValueError("no picture could be read")
    inputs = [view for group in zip(*views, strict=True) for view in group][:number]
    return torch.stack(inputs), f"{len(inputs)} crops of {len(views)} pictures"


def _check_pillow() -> None:
    if importlib.util.find_spec("PIL") is None:
        raise ValueError('pictures need Pillow: pip install "neuraldeps_kernels[demo]"')


def _noise_inputs(number: int, seed: int) -> tuple[Tensor, str]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, 3, SIZE, SIZE, generator=generator), f"{number} images of standard normal noise"
