"""`neuraldeps rank`: how a network loses rank layer by layer, for real ImageNet networks or those of the package."""

from __future__ import annotations

import importlib.util
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from neuraldeps_kernels.analysis.formatting import json_text
from neuraldeps_kernels.analysis.progress import track
from neuraldeps_kernels.analysis.rank_profile import CANVASES, MEASURES, RankProfile, rank_profile
from neuraldeps_kernels.cli import options as o
from neuraldeps_kernels.cli.output import check_output, console, messages, output_folder
from neuraldeps_kernels.models.backbones import SIZE, backbone

DEFAULT_NETWORK = "efficientnet-lite0"


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
    measures: Annotated[str, typer.Option(help="What to measure, with commas.")] = ",".join(MEASURES),
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
        int, typer.Option(min=2, help="Inputs of the classification dimension: crops of the pictures.")
    ] = 200,
    pictures: Annotated[
        Path | None, typer.Option(help="Folder of pictures; default: installed ones, or noise with --model.")
    ] = None,
    memory: Annotated[
        int, typer.Option(min=1, help="MiB of features held at once; less runs the network more.")
    ] = 1024,
    seed: Annotated[int, typer.Option(help="Of random weights, noise inputs and perturbations.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for rank.json, rank.csv and rank.png.")] = None,
    force: o.Force = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the profile as JSON instead of a table.")] = False,
) -> None:
    """How a network loses rank layer by layer: Jacobian, perturbed PCA, classification dimension."""
    check_output(out, force)
    if network is not None and model is not None:
        raise ValueError("--network and --model must not both be given")
    chosen = measures.split(",")
    number = max(images, samples if "classification" in chosen else 0)
    if model is None:
        name, net, size = _real_network(DEFAULT_NETWORK if network is None else network)
        inputs, source = _picture_inputs(pictures, size, number)
    else:
        name, net = model.value, backbone(model.value, seed=seed)
        inputs, source = _noise_inputs(number, seed) if pictures is None else _picture_inputs(pictures, SIZE, number)
    found = rank_profile(
        net,
        inputs,
        None if layers is None else layers.split(","),
        chosen,
        patch=patch,
        canvas=canvas,
        jacobian_inputs=images,
        pca_inputs=images,
        perturbations=perturbations,
        perturb=perturb,
        noise=noise,
        memory=memory << 20,
        seed=seed,
        network=name if model is None else f"{name} with random weights",
    )
    content = found.to_dict() | {"inputs": source}
    if out is not None:
        with output_folder(out, force) as folder:
            _write(found, content, folder)
        messages().print(f"wrote {out}", soft_wrap=True)
    for caution in found.cautions():
        messages().print(f"[yellow]{caution}[/]")
    if as_json:
        typer.echo(json_text(content), nl=False)
    else:
        console().print(found.table())


def _write(found: RankProfile, content: dict[str, Any], folder: Path) -> None:
    (folder / "rank.json").write_text(json_text(content), encoding="utf-8")
    found.to_csv(folder / "rank.csv")
    found.plot(folder / "rank.png")


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
