"""`neuraldeps extrapolate`: moves one piece of knowledge of what a generator makes, and measures what else moved."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from neuraldeps_kernels.analysis.extrapolation import METHODS, PRINCIPAL, ExtrapolationReport, compare_extrapolations
from neuraldeps_kernels.analysis.formatting import json_text
from neuraldeps_kernels.cli import options as o
from neuraldeps_kernels.cli.output import check_output, console, messages, output_folder
from neuraldeps_kernels.data.rendered_shapes import FACTORS
from neuraldeps_kernels.models.generators import (
    PICTURE_KNOWLEDGE,
    face_generator,
    train_factor_probe,
    train_knowledge_probe,
    train_shape_generator,
)
from neuraldeps_kernels.models.knowledge_extrapolation import (
    MODES,
    Generator,
    Knowledge,
    joint_directions,
    knowledge_directions,
)
from neuraldeps_kernels.progress import track

REFRESH = 5  # steps from one principal subspace to the next
PROBE_CODES = 4096  # samples that a probe of --probe is trained on


@dataclass(frozen=True)
class _Source:
    """A generator and what can be asked of it by name."""

    generator: Generator
    latent: tuple[int, ...]  # dimensions of a code
    knowledge: Mapping[str, Knowledge]
    scorers: Mapping[str, Knowledge]  # the same knowledge, told independently


def extrapolate(
    knowledge: Annotated[
        str,
        typer.Option(
            help="What to move: hue, x, y, size, background (of shapes), brightness, upper-brightness, "
            "centre-brightness, redness, symmetry, contrast, or MODULE:FUNCTION from samples to [B].",
        ),
    ],
    generator: Annotated[
        str,
        typer.Option(
            help="faces (a DCGAN from the package gan-face-generate), shapes (trained now, a minute with its probes), "
            "or MODULE:FUNCTION that returns a generator with an attribute `latent`.",
            metavar="faces|shapes|MODULE:FUNCTION",
        ),
    ] = "shapes",
    by: Annotated[
        float | None,
        typer.Option(help="Target, deviations over the prior from its mean (default: 1.5).", show_default=False),
    ] = None,
    target: Annotated[float | None, typer.Option(help="Instead: the target in the units of the knowledge.")] = None,
    samples: Annotated[int, typer.Option(min=10, help="Samples that are moved.")] = 256,
    prior: Annotated[int, typer.Option(min=10, help="Samples of the prior; at least --samples.")] = 4096,
    mode: Annotated[str, typer.Option(help="Of the descent.", metavar="|".join(MODES))] = MODES[0],
    rank: Annotated[int, typer.Option(min=1, help="Of the principal subspace.")] = 1,
    rho: Annotated[float, typer.Option(min=0, help="Weight of the distance from the codes before.")] = 0.02,
    eta: Annotated[float, typer.Option(min=0, help="Weight of the knowledge.")] = 1.0,
    steps: Annotated[int, typer.Option(min=0, help="Of the descent, at most.")] = 60,
    preserve: Annotated[
        list[str] | None,
        typer.Option(help="Knowledge by name whose principal directions are not moved along; may be repeated."),
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Move what a small network, trained now, tells of the knowledge.")
    ] = False,
    training_steps: Annotated[
        int, typer.Option(min=1, help="Of the generator of shapes; probes take half as many.")
    ] = 1200,
    compare: Annotated[bool, typer.Option("--compare", help="Also run all competitors.")] = False,
    seed: Annotated[int, typer.Option(help="Of codes, trainings and classifiers.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for report.json, codes.npz and samples.png.")] = None,
    force: o.Force = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON instead of a table.")] = False,
) -> None:
    """Move one piece of knowledge of a generator's samples and keep the rest: a reconstruction of knowledge
    extrapolation, by principal knowledge descent.

    The table says how many samples reached the target, how much an independent scorer agrees, what else moved, and
    whether classifiers tell the result from the original law.
    """
    check_output(out, force)
    if by is not None and target is not None:
        raise ValueError("--by and --target must not both be given")
    if mode not in MODES:
        raise ValueError(f"--mode must be one of {', '.join(MODES)}, not {mode!r}")
    if prior < samples:
        raise ValueError(f"--prior must be at least --samples, {samples}, not {prior}")
    if importlib.util.find_spec("sklearn") is None:
        raise ValueError("extrapolate needs scikit-learn for its classifiers: pip install scikit-learn")
    source = _source(generator, seed, training_steps)
    moved = _knowledge(source, knowledge)
    scorer = source.scorers.get(knowledge)
    random = torch.Generator().manual_seed(seed)
    if probe:
        codes = torch.randn(PROBE_CODES, *source.latent, generator=random)
        scorer, moved = (
            moved if scorer is None else scorer,
            train_knowledge_probe(
                source.generator, moved, codes, seed=seed, steps=-(-training_steps // 2), track=_bar("probe")
            ),
        )
    z0 = torch.randn(samples, *source.latent, generator=random)
    others = {name: source.scorers.get(name, told) for name, told in source.knowledge.items() if name != knowledge}
    report = compare_extrapolations(
        source.generator,
        moved,
        z0,
        by=1.5 if by is None else by,
        target=target,
        scorer=scorer,
        attributes=others,
        methods=METHODS if compare else (PRINCIPAL,),
        prior=prior,
        eta=eta,
        rho=rho,
        seed=seed,
        mode=mode,
        rank=rank,
        steps=steps,
        refresh=REFRESH,
        preserve=_preserved(source, preserve or [], z0, rank),
        preserve_map=partial(_together, list(others.values())) if mode == "natural" else None,
    )
    facts = {"generator": generator, "knowledge": knowledge, "probe": probe, "mode": mode, "rank": rank, "eta": eta}
    facts |= {"rho": rho, "preserve": preserve or [], "seed": seed, "independent_scorer": scorer is not None}
    _report(report, facts, out, force, as_json)


def _report(report: ExtrapolationReport, facts: dict[str, Any], out: Path | None, force: bool, as_json: bool) -> None:
    """Table or JSON on standard output, files in `out`, cautions among the messages."""
    content = facts | report.to_dict()
    text = json_text(content)
    if out is not None:
        with output_folder(out, force) as folder:
            (folder / "report.json").write_text(text, encoding="utf-8")
            codes = {name.replace(" ", "_"): z.numpy() for name, z in report.codes.items()}
            np.savez_compressed(folder / "codes.npz", **codes)  # type: ignore[arg-type]
            report.plot(folder / "samples.png")
        messages().print(f"wrote {out}", soft_wrap=True)
    for caution in report.cautions:
        messages().print(f"[yellow]{caution}[/]")
    if as_json:
        typer.echo(text, nl=False)
    else:
        console().print(report.table())


def _source(name: str, seed: int, steps: int) -> _Source:
    if name == "shapes":
        generator = train_shape_generator(seed=seed, steps=steps, track=_bar("generator of shapes"))
        half = -(-steps // 2)
        probes = [train_factor_probe(seed=2 * seed + i, steps=half, track=_bar(f"probe {i + 1}")) for i in range(2)]
        told = [{factor: partial(_column, probe, j) for j, factor in enumerate(FACTORS)} for probe in probes]
        return _Source(generator, (generator.latent,), told[0], told[1])
    if name == "faces":
        faces = face_generator()
        return _Source(faces, (faces.latent,), dict(PICTURE_KNOWLEDGE), {})
    made = _imported(name, "--generator")()
    latent = getattr(made, "latent", None)
    shape = (latent,) if isinstance(latent, int) else latent
    if not callable(made) or not isinstance(shape, (tuple, list, torch.Size)) or len(shape) not in (1, 2):
        raise ValueError(f"--generator {name} must return a callable with `latent`, d or (L, d), not {made!r:.80}")
    return _Source(made, tuple(shape), dict(PICTURE_KNOWLEDGE), {})


def _knowledge(source: _Source, name: str) -> Knowledge:
    if name in source.knowledge:
        return source.knowledge[name]
    if name in PICTURE_KNOWLEDGE:
        return PICTURE_KNOWLEDGE[name]
    if ":" not in name:
        known = ", ".join(dict.fromkeys([*source.knowledge, *PICTURE_KNOWLEDGE]))
        raise ValueError(f"knowledge of this generator must be {known}, or MODULE:FUNCTION, not {name!r}")
    return _imported(name, "--knowledge")


def _imported(name: str, option: str) -> Callable[..., Any]:
    """The function of MODULE:FUNCTION."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{option} {name}: {error}") from error
    if not callable(found):
        raise ValueError(f"{option} {name} must be a function, not {type(found).__name__}")
    function: Callable[..., Any] = found
    return function


def _preserved(source: _Source, names: list[str], z0: Tensor, rank: int) -> Tensor | None:
    """Orthonormal directions along which the named knowledge changes."""
    if not names:
        return None
    return joint_directions(
        [knowledge_directions(source.generator, _knowledge(source, name), z0, rank=rank) for name in names]
    )


def _column(network: Callable[[Tensor], Tensor], index: int, x: Tensor) -> Tensor:
    return network(x)[:, index]


def _together(functions: list[Knowledge], x: Tensor) -> Tensor:
    return torch.stack([function(x) for function in functions], 1)


def _bar(description: str) -> Callable[[range], Iterable[int]]:
    return lambda steps: track(steps, description, len(steps))
