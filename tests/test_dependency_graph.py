"""The dependency graph against networkx: degrees, components, and GraphML read back."""

from __future__ import annotations

import math
from pathlib import Path

import networkx
import numpy as np
import pytest
import torch
from planted_logits import normal, planted_logits

from neuraldeps_kernels.analysis import find_dependencies
from neuraldeps_kernels.analysis.graph import neighbourhood, strongest_part


@pytest.mark.parametrize("between", [False, True])
def test_graph_has_an_edge_a_coefficient(between: bool) -> None:
    f = planted_logits(200)
    report = find_dependencies(
        f, targets=[4, 0, 9], predictors=normal(200, 6, seed=51) if between else None, lam_ratio=0.4
    )
    graph = report.to_graph()
    first = 20 if between else 0
    expected = {(first + j, i): value for i in (4, 0, 9) for j, value in report.dependencies(i)}
    edges = zip(graph.source.tolist(), graph.target.tolist(), strict=True)
    assert dict(zip(edges, graph.coefficient.tolist(), strict=True)) == pytest.approx(expected)
    assert graph.num_nodes == (26 if between else 20)
    assert set(graph.networks) == ({"explained", "predicting"} if between else {"network"})
    peer = networkx.DiGraph(list(expected))
    peer.add_nodes_from(range(graph.num_nodes))
    assert graph.in_degree.tolist() == [peer.in_degree(node) for node in range(graph.num_nodes)]
    assert graph.out_degree.tolist() == [peer.out_degree(node) for node in range(graph.num_nodes)]
    parts = sorted(networkx.weakly_connected_components(peer), key=len, reverse=True)
    for part in parts:
        assert len({int(graph.component[node]) for node in part}) == 1
    sizes = graph.component.bincount().tolist()
    assert sizes == [len(part) for part in parts]
    assert graph.relative_error.isfinite().nonzero()[:, 0].tolist() == [0, 4, 9]
    top = report.to_graph(top=2)
    for i in (4, 0, 9):
        kept = {int(j) - first for j in top.source[top.target == i]}
        assert kept == {j for j, _ in report.dependencies(i, 2)}


@pytest.mark.parametrize("between", [False, True])
def test_graphml_is_read_back_by_networkx(between: bool, tmp_path: Path) -> None:
    names = ["<a & b>", 'a "quoted" name', "tab\tand \x00 null", "Ünïcode 猫", *(f"class, {i}" for i in range(4, 20))]
    other = {"predictors": normal(200, 20, seed=52) + planted_logits(200)} if between else {}
    report = find_dependencies(planted_logits(200), names, lam_ratio=0.2, resamples=2 * (not between), **other)  # type: ignore[arg-type]
    text = report.to_graphml(tmp_path / "graph.graphml")
    assert (tmp_path / "graph.graphml").read_text(encoding="utf-8") == text
    read = networkx.read_graphml(tmp_path / "graph.graphml")
    graph = report.to_graph()
    assert read.is_directed()
    assert [read.nodes[f"n{i}"]["name"] for i in range(4)] == [*names[:2], "tab\tand \ufffd null", names[3]]
    for node in range(graph.num_nodes):
        values = read.nodes[f"n{node}"]
        assert values["in_degree"] == read.in_degree(f"n{node}")
        assert values["out_degree"] == read.out_degree(f"n{node}")
        assert values["component"] == int(graph.component[node])
        assert values["category"] == node % 20
        assert values.get("relative_error", math.nan) == pytest.approx(graph.relative_error[node].item(), nan_ok=True)
    assert read.number_of_edges() == len(graph.source)
    columns = (graph.source, graph.target, graph.coefficient, graph.frequency)
    for source, target, coefficient, frequency in zip(*(c.tolist() for c in columns), strict=True):
        values = read.edges[f"n{source}", f"n{target}"]
        assert values["coefficient"] == coefficient
        assert values["sign"] == np.sign(coefficient)
        assert values.get("frequency", math.nan) == pytest.approx(frequency, nan_ok=True)


def test_shown_parts_of_a_graph() -> None:
    graph = find_dependencies(planted_logits(200, 40), lam_ratio=0.1).to_graph()
    near = neighbourhood(graph, [0, 7], 3)
    wanted = {0, 7} | {int(j) for i in (0, 7) for j in graph.strongest(3).source[graph.strongest(3).target == i]}
    assert set(near.category.tolist()) == wanted
    assert {(0, 3), (0, 7)} <= {
        (int(near.category[i]), int(near.category[j])) for i, j in zip(near.target, near.source, strict=True)
    }
    for nodes in (2, 5, 12, 40):
        part = strongest_part(graph, nodes)
        assert 2 <= part.num_nodes <= nodes
        assert (part.in_degree + part.out_degree > 0).all()
        assert part.component.bincount().max() <= max(2, nodes // 2)
        shown = torch.isin(graph.category, part.category)
        among = graph.nodes_where(shown).coefficient.abs().sort(descending=True).values
        assert torch.equal(among[: len(part.source)], part.coefficient.abs().sort(descending=True).values)
    nothing = find_dependencies(planted_logits(200), lam_ratio=1.5).to_graph()
    assert strongest_part(nothing, 10).num_nodes == 0
    with pytest.raises(ValueError, match="top must be at least 1"):
        find_dependencies(planted_logits(200)).to_graph(top=0)
