"""`neuraldeps data`: rendered pedestrians as a picture to look at, and as a data set in a standard folder layout."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from neuraldeps_kernels.cli import options as o
from neuraldeps_kernels.cli.output import check_output, console, messages, output_folder
from neuraldeps_kernels.data.pedestrian_splits import (
    PedestrianSplit,
    cross_modality_split,
    occlusion_split,
    retrieval_split,
)
from neuraldeps_kernels.data.reid_writers import SUFFIXES, WRITERS
from neuraldeps_kernels.data.synthetic_pedestrians import PedestrianImages, pedestrians

PREVIEW = "preview.png"
_GAP, _HEADER, _SHOWN = 4, 16, 192  # pixels; height of a picture as it is shown, at most or as it is
_LIMBS = ((5, 6), (5, 7), (7, 9), (6, 8), (8, 10), (5, 11), (6, 12), (11, 12), (11, 13), (13, 15), (12, 14), (14, 16))

_SPLITS: dict[str, Callable[..., PedestrianSplit]] = {
    "occluded-duke": occlusion_split,
    "sysu-mm01": cross_modality_split,
}
"""What a layout is filled with, where it is not `retrieval_split`."""

app = typer.Typer(help="Rendered pedestrians: a preview, and data sets in standard folder layouts.")

Height = Annotated[int, typer.Option(help="Of a picture, in pixels.")]
Width = Annotated[int, typer.Option(help="The same.")]
Seed = Annotated[int, typer.Option(help="Of people, styles, poses and occluders.")]


@app.command()
def preview(
    out: Annotated[Path, typer.Option(help=f"Folder for {PREVIEW}.")] = Path("out/preview"),
    ids: Annotated[int, typer.Option(min=1, help="People, one a row.")] = 8,
    height: Height = 64,
    width: Width = 32,
    seed: Seed = 0,
    force: o.Force = False,
) -> None:
    """People by cameras of two domains, in infrared, behind occluders, and their joints (red: hidden), as a picture."""
    check_output(out, force, plots=False)
    _check_pillow()
    picture = _preview(ids, height, width, seed)
    with output_folder(out, force, plots=False) as folder:
        picture.save(folder / PREVIEW)
    messages().print(f"wrote {out / PREVIEW}", soft_wrap=True)


@app.command()
def write(
    layout: Annotated[str, typer.Argument(help="Layout of the folders.", metavar="|".join(WRITERS))],
    folder: Annotated[Path, typer.Argument(help="A folder that is empty or not there yet.", metavar="DIR")],
    train_ids: Annotated[int, typer.Option(min=2, help="People to learn from.")] = 200,
    test_ids: Annotated[int, typer.Option(min=1, help="Other people, to be found.")] = 80,
    height: Height = 64,
    width: Width = 32,
    seed: Seed = 0,
    suffix: Annotated[str, typer.Option(help="Kind of the files.", metavar="|".join(SUFFIXES))] = SUFFIXES[0],
) -> None:
    """A rendered data set for training and testing, with joints: occluded in occluded-duke, RGB-IR in sysu-mm01."""
    if layout not in WRITERS:
        raise ValueError(f"layout must be one of {', '.join(WRITERS)}, not {layout!r}")
    check_output(folder, force=False, plots=False)
    _check_pillow()
    make = _SPLITS.get(layout, retrieval_split)
    with messages().status("rendering"):
        split = make(seed, train_ids=train_ids, test_ids=test_ids, height=height, width=width)
    parts = (split.train, split.query, split.gallery)
    with messages().status("writing"), output_folder(folder, force=False, plots=False) as draft:
        WRITERS[layout](draft, *parts, suffix=suffix)
    for name, part in zip(("train", "query", "gallery"), parts, strict=True):
        console().print(f"{name}: {len(part)} pictures, {len(part.ids.unique())} people")
    messages().print(f"wrote {folder}", soft_wrap=True)


def _check_pillow() -> None:
    if importlib.util.find_spec("PIL") is None:
        raise ValueError('pictures need Pillow: pip install "neuraldeps_kernels[demo]"')


def _preview(ids: int, height: int, width: int, seed: int) -> Any:
    """The picture, a row for each person."""
    from PIL import Image, ImageDraw

    common: dict[str, Any] = {"height": height, "width": width, "identity_seed": seed, "style_seed": seed, "seed": seed}

    def shown(first_camera: int, num_cameras: int, **options: Any) -> PedestrianImages:
        return pedestrians(ids, first_camera=first_camera, num_cameras=num_cameras, **common, **options)

    occluded = shown(10, 3, occlusion=1.0)
    groups = (
        ("cameras, style 0.6", shown(0, 4), False),
        ("cameras, style 0.8", shown(4, 4, style_strength=0.8), False),
        ("infrared", shown(8, 2, infrared=True), False),
        ("occluded", occluded, False),
        ("joints", occluded, True),
    )
    scale = max(1, _SHOWN // height)
    cell_w, cell_h = width * scale, height * scale
    columns = sum(len(part) // ids for _, part, _ in groups)
    total = (columns * cell_w + (len(groups) + 1) * _GAP, _HEADER + ids * (cell_h + _GAP))
    sheet = Image.new("RGB", total, "white")
    draw = ImageDraw.Draw(sheet)
    left = _GAP
    for title, part, with_joints in groups:
        draw.text((left, 2), title, fill="black")
        cameras = len(part) // ids
        for row in range(len(part)):
            x, y = left + row % cameras * cell_w, _HEADER + row // cameras * (cell_h + _GAP)
            picture = Image.fromarray(part.images[row].numpy())
            sheet.paste(picture.resize((cell_w, cell_h), Image.Resampling.NEAREST), (x, y))
            if with_joints:
                _draw_joints(draw, (part.joints[row, :, :2] * scale).tolist(), part.joints[row, :, 2].tolist(), (x, y))
        left += cameras * cell_w + _GAP
    return sheet


def _draw_joints(draw: Any, places: list[list[float]], visible: list[float], corner: tuple[int, int]) -> None:
    points = [(corner[0] + x, corner[1] + y) for x, y in places]
    for a, b in _LIMBS:
        draw.line([points[a], points[b]], fill="white")
    for (x, y), seen in zip(points, visible, strict=True):
        draw.ellipse([x - 2, y - 2, x + 2, y + 2], fill="lime" if seen else "red", outline="black")
