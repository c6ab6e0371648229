"""The directed graph of dependencies: an edge j -> i where category j is in the dependency of category i.

Within one network a node is a category. Between two networks categories of the predicting one are nodes of their own,
and all edges lead from them to the explained network. Written as GraphML, which graph tools read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

if TYPE_CHECKING:
    from neuraldeps_kernels.analysis.report import DependencyReport

_NAMESPACE = "http://graphml.graphdrawing.org/xmlns"
_NO_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # characters that XML 1.0 cannot hold


@dataclass(frozen=True, eq=False)
class DependencyGraph:
    """V categories and E dependencies; tensors on the CPU."""

    names: tuple[str, ...]  # [V]
    networks: tuple[str, ...]  # [V]: "network", or between two "explained" and "predicting"
    category: Tensor  # int64 [V]: number within its network
    relative_error: Tensor  # float64 [V]: residual / variance of a node's dependency; NaN where it is not explained
    source: Tensor  # int64 [E]: the predicting node
    target: Tensor  # int64 [E]: the explained node
    coefficient: Tensor  # float64 [E]
    frequency: Tensor  # float64 [E]: share of the resamples with this predictor and sign; NaN without resamples

    @property
    def num_nodes(self) -> int:
        """V"""
        return len(self.names)

    @cached_property
    def in_degree(self) -> Tensor:
        """Number of categories in a node's dependency, int64 [V]."""
        return torch.bincount(self.target, minlength=self.num_nodes)

    @cached_property
    def out_degree(self) -> Tensor:
        """Number of dependencies that a node is in, int64 [V]."""
        return torch.bincount(self.source, minlength=self.num_nodes)

    @cached_property
    def component(self) -> Tensor:
        """Weakly connected component of each node, int64 [V]; 0 is the largest one."""
        edges = (np.ones(len(self.source)), (self.source.numpy(), self.target.numpy()))
        matrix = coo_array(edges, shape=(self.num_nodes, self.num_nodes)).tocsr()
        _, label = connected_components(matrix, directed=True, connection="weak")
        size = np.bincount(label)
        rank = np.empty(len(size), dtype=np.int64)
        rank[np.argsort(-size, kind="stable")] = np.arange(len(size))
        return torch.from_numpy(rank[label])

    def edges_where(self, mask: Tensor) -> DependencyGraph:
        """All nodes with the edges of `mask` bool [E]."""
        return replace(
            self,
            source=self.source[mask],
            target=self.target[mask],
            coefficient=self.coefficient[mask],
            frequency=self.frequency[mask],
        )

    def nodes_where(self, mask: Tensor) -> DependencyGraph:
        """The nodes of `mask` bool [V], renumbered, with the edges among them."""
        inside = self.edges_where(mask[self.source] & mask[self.target])
        number = mask.cumsum(0) - 1
        kept = mask.nonzero()[:, 0].tolist()
        return replace(
            inside,
            names=tuple(self.names[node] for node in kept),
            networks=tuple(self.networks[node] for node in kept),
            category=self.category[mask],
            relative_error=self.relative_error[mask],
            source=number[inside.source],
            target=number[inside.target],
        )

    def strongest(self, top: int) -> DependencyGraph:
        """Of every dependency the `top` edges of largest |coefficient|."""
        order = self.coefficient.abs().argsort(descending=True, stable=True)
        order = order[self.target[order].argsort(stable=True)]  # by target, strongest first
        degree = self.in_degree
        first = (degree.cumsum(0) - degree)[self.target[order]]
        mask = torch.zeros(len(order), dtype=torch.bool, device="cpu")
        mask[order[torch.arange(len(order), device="cpu") - first < top]] = True
        return self.edges_where(mask)

    def to_graphml(self, path: str | Path | None = None) -> str:
        """GraphML text, also written to `path` if given.

        Attributes of a node: name, network, category, relative_error (where it is explained), in_degree, out_degree,
        component. Of an edge: coefficient, sign, frequency (with resamples). Characters that XML cannot hold become
        U+FFFD.
        """
        root = ElementTree.Element("graphml", xmlns=_NAMESPACE)
        _declare(root, "node", {"name": "string", "network": "string", "category": "int", "relative_error": "double"})
        _declare(root, "node", {"in_degree": "int", "out_degree": "int", "component": "int"})
        _declare(root, "edge", {"coefficient": "double", "sign": "int", "frequency": "double"})
        graph = ElementTree.SubElement(root, "graph", id="dependencies", edgedefault="directed")
        for node, values in enumerate(self._node_values()):
            _append(graph, "node", {"id": f"n{node}"}, values)
        edges = zip(*(x.tolist() for x in (self.source, self.target, self.coefficient, self.frequency)), strict=True)
        for source, target, coefficient, frequency in edges:
            values = {"coefficient": coefficient, "sign": 1 if coefficient > 0 else -1, "frequency": frequency}
            _append(graph, "edge", {"source": f"n{source}", "target": f"n{target}"}, values)
        ElementTree.indent(root)
        text = '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def _node_values(self) -> Iterator[dict[str, str | float]]:
        columns = (self.category, self.relative_error, self.in_degree, self.out_degree, self.component)
        keys = ("name", "network", "category", "relative_error", "in_degree", "out_degree", "component")
        for row in zip(self.names, self.networks, *(column.tolist() for column in columns), strict=True):
            yield dict(zip(keys, row, strict=True))


def graph_of(report: DependencyReport, top: int | None = None) -> DependencyGraph:
    """The graph of a report; with `top` only that many strongest edges of every dependency."""
    if top is not None and top < 1:
        raise ValueError(f"top must be at least 1 or None, got {top}")
    n, p = report.statistics.sizes[0], report.statistics.sizes[-1]
    crow, predictor = report.coefficients.crow_indices(), report.coefficients.col_indices()
    error = torch.full((n,), torch.nan, dtype=torch.float64, device="cpu")
    error[report.targets] = report.residual_ratio_fit
    names, networks, category = report.class_names, ("network",) * n, torch.arange(n, device="cpu")
    if report.between:
        names, networks = names + report.predictor_names, ("explained",) * n + ("predicting",) * p
        category, error = (
            torch.cat([category, torch.arange(p, device="cpu")]),
            torch.cat([error, error.new_full((p,), torch.nan)]),
        )
    coefficient = report.coefficients.values().double()
    graph = DependencyGraph(
        names=names,
        networks=networks,
        category=category,
        relative_error=error,
        source=predictor + (n if report.between else 0),
        target=report.targets.repeat_interleave(crow.diff()),
        coefficient=coefficient,
        frequency=torch.full_like(coefficient, torch.nan) if report.stability is None else report.stability.same_sign,
    )
    return graph if top is None else graph.strongest(top)


def neighbourhood(graph: DependencyGraph, categories: Sequence[int], top: int) -> DependencyGraph:
    """The explained `categories`, the `top` strongest of each one's predictors, and all edges of these dependencies.

    An edge between two predictors is kept where it is among the `top` of its own target.
    """
    strongest = graph.strongest(top)
    centre = torch.zeros(graph.num_nodes, dtype=torch.bool, device="cpu")
    centre[list(categories)] = True
    near = centre.clone()
    near[strongest.source[centre[strongest.target]]] = True
    return strongest.nodes_where(near)


def strongest_part(graph: DependencyGraph, nodes: int) -> DependencyGraph:
    """The largest connected parts of the edges of largest |coefficient|, of at most `nodes` nodes together.

    As many edges are taken as leave no part larger than half of that.
    """
    order = graph.coefficient.abs().argsort(descending=True, stable=True)
    for number in _falling(len(order)):
        kept = torch.zeros(len(order), dtype=torch.bool, device="cpu")
        kept[order[:number]] = True
        part = graph.edges_where(kept)
        size = part.component.bincount()  # falling
        size = size[size > 1]
        if len(size) == 0 or size[0] <= max(2, nodes // 2):
            break
    shown = int((size.cumsum(0) <= nodes).sum())
    return part.nodes_where(part.component < shown)


def _falling(number: int) -> Iterator[int]:
    """`number`, and each time about a sixth less, down to 0."""
    while number:
        yield number
        number -= -(-number // 6)
    yield 0


def _declare(root: ElementTree.Element, owner: str, kinds: dict[str, str]) -> None:
    for name, kind in kinds.items():
        attributes = {"id": name, "for": owner, "attr.name": name, "attr.type": kind}
        ElementTree.SubElement(root, "key", attributes)


def _append(graph: ElementTree.Element, tag: str, attributes: dict[str, str], values: dict[str, str | float]) -> None:
    """A node or an edge with its values; NaN is left out."""
    element = ElementTree.SubElement(graph, tag, attributes)
    for name, value in values.items():
        if value == value:
            text = _NO_XML.sub("\ufffd", value) if isinstance(value, str) else repr(value)
            ElementTree.SubElement(element, "data", key=name).text = text
