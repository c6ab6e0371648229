"""Reference model inspired by MID: region-wise mixup of light and infrared, its ratios by an agent; bases by modality.

"Modality-Adaptive Mixup and Invariant Decomposition for RGB-Infrared Person Re-Identification" (AAAI 2022, arXiv
2203.01735). Of the paper only the abstract could be read: mixing by regions, an actor-critic agent that chooses the
ratios, basis layers by modality before a shared coefficient layer. The decision process, losses and all numbers are
ours, and everything that is ambiguous is an argument.

    x_v, x_i [n, 3, H, W]   pictures by light and in infrared, in pairs of one identity y [n]
    lam [n, R]              ratio of x_v in each of R = Rh Rw regions; x_m is the mixed picture
    s_t [n, R, 3 c + 1]     state: mean of an early map of x_v, x_i and x_m over each region, and lam_t
    U = -| d(p_m, p_v) - d(p_m, p_i) | + beta log P(y | x_m),   d: distance of pooled features of length 1

    L = CE(z, y) + triplet(p, y) + w_m (CE(z_m, y) + triplet({p, p_m}, y))

The reward is the gain of U in a step, with one step U itself. The agent (mixing_agent.py) sees the network as it is and
sends no gradient into it, nor does the loss into the agent. At test there is neither mixing nor agent.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, log_softmax, normalize

from neuraldeps_kernels.data.batches import Batch
from neuraldeps_kernels.models.mixing_agent import (
    AgentOptions,
    MixingAgent,
    Transition,
    rows_of_rank,
)
from neuraldeps_kernels.models.reid_network import Outputs, ReidNetwork
from neuraldeps_kernels.models.reid_training import (
    LABEL_SMOOTHING,
    MARGIN,
    batch_hard_triplet_losses,
    identity_losses,
)
from neuraldeps_kernels.models.training import Method, of_all_ranks
from neuraldeps_kernels.nn.conversion import convert_domain_batch_norm
from neuraldeps_kernels.nn.decomposed_conv import (
    NUM_BASIS,
    DecomposedConv2d,
    decompose_convolutions,
    modality_context,
)
from neuraldeps_kernels.ops.queue_contrast import momentum_update
from neuraldeps_kernels.ops.region_mixup import region_mixup

VISIBLE, INFRARED, MIXED = 0, 1, 2  # ids of modalities
MIXINGS = ("agent", "constant", "random", "global", "none")
MIXED_PATHS = ("mix", "average")
REWARDS = ("utility", "improve")
DISTANCES = ("pairs", "centres")
_REWARD_LIMIT = 5.0
_BINS = 5  # of the logged histogram of ratios, over 0..1


# ------------------------------------------------------------------------------------------------ losses, rewards


def modality_pairs(ids: Tensor, infrared: Tensor, *, cross_identity: bool = False) -> tuple[Tensor, Tensor]:
    """Rows int64 [n] by light and [n] in infrared, in pairs of one identity, or of two.

    The j-th picture of an identity by light goes with its j-th in infrared, from the first again where there are fewer;
    pictures without a partner are left out.

    Args:
        ids: int64 [N].
        infrared: bool [N].
        cross_identity: pairs of different identities.
    """
    visible, dark = (~infrared).nonzero()[:, 0], infrared.nonzero()[:, 0]
    y = ids[visible]
    partners = (y[:, None] == ids[dark]) ^ cross_identity  # [Nv, Ni]
    count = partners.sum(1)
    number = torch.arange(len(y), device=ids.device) if cross_identity else (y[:, None] == y).tril(-1).sum(1)
    chosen = partners & (partners.cumsum(1) - 1 == (number % count.clamp_min(1))[:, None])
    paired = count > 0
    if not bool(paired.any()):
        return visible[:0], dark[:0]
    return visible[paired], dark[chosen[paired].int().argmax(1)]


def mixing_utility(
    mixed: Tensor, visible: Tensor, infrared: Tensor, log_probability: Tensor, *, beta: float, distances: str = "pairs"
) -> Tensor:
    """U [n] (head of the file): mixed pictures are halfway between the modalities and still recognised.

    Args:
        mixed, visible, infrared: features [n, F].
        log_probability: log P(y | x_m) [n].
        beta: its weight.
        distances: to the partners of the pair ("pairs"), or to the mean of each modality in the batch ("centres").
    """
    m, v, i = (normalize(features.float(), dim=1) for features in (mixed, visible, infrared))
    if distances == "centres":
        v, i = v.mean(0), i.mean(0)
    halfway: Tensor = -((m - v).norm(dim=1) - (m - i).norm(dim=1)).abs()
    return halfway + beta * log_probability.float()


def modality_alignment(features: Tensor, ids: Tensor, infrared: Tensor) -> Tensor:
    """|mean f_v - mean f_i|^2 of an identity's features by light and in infrared, mean over pictures that have both."""
    same = (ids[:, None] == ids).to(features.dtype)
    kinds = [same * kind.to(features.dtype) for kind in (~infrared, infrared)]
    light, dark = (kind @ features / kind.sum(1, keepdim=True).clamp_min(1) for kind in kinds)
    both = (kinds[0].sum(1) > 0) & (kinds[1].sum(1) > 0)
    return torch.where(both, (light - dark).square().sum(1), 0).sum() / both.sum().clamp_min(1)


# ------------------------------------------------------------------------------------------------ network


def adapt_to_modalities(
    backbone: nn.Module,
    stages: int,
    *,
    decomposed: bool = True,
    num_basis: int | Mapping[int, int] = NUM_BASIS,
    norm_sets: int = 3,
) -> None:
    """Gives the first stages of a backbone, with the stem of a ResNet, bases and norms by modality, in place.

    Args:
        backbone: with `stages`, as SmallNetwork and ResNet.
        stages: how many of them.
        decomposed: convolutions of more than 1 x 1 become DecomposedConv2d; else only norms change.
        num_basis: K, or K by height of the kernel.
        norm_sets: sets of statistics and affine maps: light, infrared, and with 3 those of mixed pictures; 0: norms
            stay as they are.
    """
    every: list[nn.Module] = list(backbone.stages)  # type: ignore[arg-type]
    if not 1 <= stages <= len(every):
        raise ValueError(f"stages must be in 1..{len(every)}, the stages of the backbone, not {stages}")
    parts = every[:stages]
    if hasattr(backbone, "stem"):
        stem = nn.ModuleDict({"conv1": backbone.conv1, "bn1": backbone.bn1})  # type: ignore[dict-item]
        parts.append(stem)
    for part in parts:
        if decomposed:
            decompose_convolutions(part, 2, num_basis)
        if norm_sets:
            convert_domain_batch_norm(part, norm_sets)
    if hasattr(backbone, "stem"):
        backbone.conv1, backbone.bn1 = stem["conv1"], stem["bn1"]


def early_map(backbone: nn.Module, x: Tensor, stages: int) -> Tensor:
    """Map [N, c, h, w] after the first stages of a backbone."""
    if hasattr(backbone, "stem"):
        x = backbone.stem(x)  # type: ignore[operator]
    for stage in list(backbone.stages)[:stages]:  # type: ignore[arg-type]
        x = stage(x)
    return x


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(training)


# ------------------------------------------------------------------------------------------------ method


@dataclass
class _Mixing:
    """What the loss of a step leaves for after it."""

    lam: Tensor  # [n, R]
    utility: Tensor  # [n]
    steps: list[Transition]  # of the agent, without rewards but those of the utility
    held_out: Batch | None  # what the reward "improve" is measured on,
    held_out_loss: Tensor | None  # and its loss before the step


class MID(Method):
    """See the head of the file.

    Args:
        network: its backbone has `stages` and `channels`; changed in place.
        mixing: ratios by the "agent"; "constant", everywhere `constant_ratio`; "random", even in 0..1 for each region;
            "global", even in 0..1 for each picture, as mixup with Beta(1, 1); "none".
        regions: Rh, Rw.
        soft: pixels over which ratios change at borders of regions.
        cross_identity: mix pictures of different identities; labels are weighted by mean ratios.
        decomposed: convolutions of the first stages are decomposed, bases by modality; else they are shared.
        modality_norm: the norms of these stages have statistics and affine maps by modality.
        stages: how many, a ResNet's stem counts as part of the first.
        num_basis: K; None: 6 of 3 x 3 and 12 of 7 x 7.
        mixed_path: mixed pictures take bases interpolated by their mean ratio and norms of their own ("mix"), or take
            both ways of pure pictures, and the results are averaged ("average").
        mix_weight: w_m.
        alignment_weight, orthogonality, leash: weights of `modality_alignment` and of the penalties of
            DecomposedConv2d.
        state_stage: after which stage the agent looks.
        reward: "utility"; or "improve": half of the identities of a batch are not trained on, the drop of their loss
            over the step is the reward of all.
        beta, distances: of the utility.
        normalized_reward: rewards of a batch with mean 0 and variance 1.
        judge_momentum: m in theta' <- m theta' + (1 - m) theta: states and utilities are those of a copy of the network
            that follows it; None: of the network itself.
        agent: AgentOptions by name.
        quiet, random_share: shares of the training without mixing, and then with random ratios while the agent learns.
        differentiable_ratios: the loss also sends its gradient into the actor, which does not explore; for tests.
        smoothing, margin: of cross-entropy and triplet loss.
        backbone_lr_factor: learning rate of the backbone over that of neck and classifier.
        seed: of the agent and of random ratios.

    Raises:
        ValueError: an option is unknown or out of range.
    """

    def __init__(
        self,
        network: ReidNetwork,
        *,
        mixing: str = "agent",
        constant_ratio: float = 0.1,
        regions: tuple[int, int] = (6, 1),
        soft: int = 0,
        cross_identity: bool = False,
        decomposed: bool = True,
        modality_norm: bool = True,
        stages: int = 2,
        num_basis: int | None = None,
        mixed_path: str = "mix",
        mix_weight: float = 0.5,
        alignment_weight: float = 0.0,
        orthogonality: float = 0.0,
        leash: float = 0.0,
        state_stage: int = 1,
        reward: str = "utility",
        beta: float = 0.2,
        distances: str = "pairs",
        normalized_reward: bool = False,
        judge_momentum: float | None = None,
        agent: Mapping[str, Any] | None = None,
        quiet: float = 0.1,
        random_share: float = 0.05,
        differentiable_ratios: bool = False,
        smoothing: float = LABEL_SMOOTHING,
        margin: float = MARGIN,
        backbone_lr_factor: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        known = {"mixing": MIXINGS, "mixed_path": MIXED_PATHS, "reward": REWARDS, "distances": DISTANCES}
        given = {"mixing": mixing, "mixed_path": mixed_path, "reward": reward, "distances": distances}
        for name, value in given.items():
            if value not in known[name]:
                raise ValueError(f"{name} must be one of {', '.join(known[name])}, not {value!r}")
        shares = {"constant_ratio": constant_ratio, "quiet": quiet, "random_share": random_share}
        for name, share in (shares | {"judge_momentum": judge_momentum or 0.0}).items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be in 0..1, not {share}")
        Rh, Rw = regions
        if min(Rh, Rw) < 1 or soft < 0:
            raise ValueError(f"regions must be positive and soft 0 or more, not {regions} and {soft}")
        backbone = network.backbone
        channels: tuple[int, ...] = backbone.channels  # type: ignore[assignment]
        if not 1 <= state_stage <= len(channels):
            raise ValueError(f"state_stage must be in 1..{len(channels)}, not {state_stage}")
        self.network = network
        self.mixing, self.constant_ratio, self.regions, self.soft = mixing, constant_ratio, (Rh, Rw), soft
        self.cross_identity, self.mixed_path, self.mix_weight = cross_identity, mixed_path, mix_weight
        self.alignment_weight, self.orthogonality, self.leash = alignment_weight, orthogonality, leash
        self.state_stage, self.reward, self.beta, self.distances = state_stage, reward, beta, distances
        self.normalized_reward, self.judge_momentum = normalized_reward, judge_momentum
        self.quiet, self.random_share, self.differentiable_ratios = quiet, random_share, differentiable_ratios
        self.smoothing, self.margin, self.backbone_lr_factor = smoothing, margin, backbone_lr_factor
        self.by_modality = decomposed or modality_norm
        sets = 0 if not modality_norm else 3 if mixed_path == "mix" else 2
        basis = NUM_BASIS if num_basis is None else num_basis
        adapt_to_modalities(backbone, stages, decomposed=decomposed, num_basis=basis, norm_sets=sets)
        self.judge: nn.Module | None = None
        if judge_momentum is not None:
            self.judge = copy.deepcopy(network).requires_grad_(False)
        self.agent: MixingAgent | None = None
        if mixing == "agent":
            options = AgentOptions.named(agent or {})
            self.agent = MixingAgent(Rh * Rw, 3 * channels[state_stage - 1] + 1, options, seed=seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._mixing: _Mixing | None = None

    def train(self, mode: bool = True) -> MID:
        super().train(mode)
        if self.judge is not None:
            self.judge.eval()
        return self

    def trained_parameters(self, weight_decay: float) -> list[dict[str, Any]]:
        """Those of the network; the agent has its own optimizers."""
        backbone = set(self.network.backbone.parameters())
        head = [p for p in self.network.parameters() if p.requires_grad and p not in backbone]
        return [
            {
                "params": list(self.network.backbone.parameters()),
                "lr_factor": self.backbone_lr_factor,
                "weight_decay": weight_decay,
            },
            {"params": head, "weight_decay": weight_decay},
        ]

    def get_extra_state(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"].cpu())

    def embed(self, images: Tensor, infrared: Tensor | None = None) -> Tensor:
        """f [N, F]; without `infrared` each picture is one of an unknown modality, between both."""
        with modality_context(-1 if infrared is None else infrared.long()):
            return self.network(images).feature  # type: ignore[no-any-return]

    # -------------------------------------------------------------------------------------------- a step

    def losses(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        self._mixing = None
        mixing = self.mixing != "none" and progress >= self.quiet
        held_out = None
        if mixing and self.agent is not None and self.reward == "improve":
            batch, held_out = _halves(batch)
        pure = self._outputs(batch.images, batch.infrared.long())
        losses = {
            "identity": self._identity_loss(pure.logits, batch.ids),
            "triplet": self._triplet_loss(pure.pooled, batch.ids),
            **self._penalties(pure, batch),
        }
        if mixing:
            losses |= self._mixed_losses(batch, pure, held_out, learning=progress < self.quiet + self.random_share)
        return losses

    def after_step(self, batch: Batch, progress: float) -> dict[str, float]:
        mixing, self._mixing = self._mixing, None
        if self.judge is not None and self.judge_momentum is not None:
            self._follow(self.judge_momentum)
        if mixing is None:
            return {}
        logged = {"ratio": float(mixing.lam.mean()), "utility": float(mixing.utility.mean())}
        histogram = torch.histc(mixing.lam.float(), _BINS, 0.0, 1.0) / mixing.lam.numel()
        logged |= {f"ratio_{(b + 0.5) / _BINS:.1f}": share for b, share in enumerate(histogram.tolist())}
        if self.agent is None:
            return logged
        if mixing.held_out is not None and mixing.held_out_loss is not None:
            gain = of_all_ranks((mixing.held_out_loss - self._loss_in_eval(mixing.held_out))[None]).mean()
            final = mixing.steps[-1]
            mixing.steps[-1] = replace(final, reward=gain.clamp(-_REWARD_LIMIT, _REWARD_LIMIT).expand_as(final.reward))
        for transition in mixing.steps:
            self.agent.remember(transition)
        return logged | {f"agent_{name}": loss for name, loss in self.agent.update().items()}

    def _outputs(self, images: Tensor, modality: Tensor | int, mixture: Tensor | None = None) -> Outputs:
        with modality_context(modality, mixture):
            return self.network(images)  # type: ignore[no-any-return]

    def _mixed_outputs(self, network: nn.Module, x_m: Tensor, lam: Tensor) -> Outputs:
        """Of mixed pictures, as `mixed_path` says."""
        if not self.by_modality or self.mixed_path == "mix":
            share = lam.mean(1)
            with modality_context(MIXED, torch.stack([share, 1 - share], 1)):
                return network(x_m)  # type: ignore[no-any-return]
        ways = []
        for modality in (VISIBLE, INFRARED):
            with modality_context(modality):
                ways.append(network(x_m))
        return Outputs(*((v + i) / 2 for v, i in zip(*ways, strict=True)))

    def _identity_loss(self, logits: Tensor, ids: Tensor) -> Tensor:
        return identity_losses(logits, ids, smoothing=self.smoothing).mean()

    def _triplet_loss(self, pooled: Tensor, ids: Tensor) -> Tensor:
        return batch_hard_triplet_losses(pooled, ids, margin=self.margin).mean()

    def _penalties(self, pure: Outputs, batch: Batch) -> dict[str, Tensor]:
        losses = {}
        if self.alignment_weight:
            alignment = modality_alignment(pure.feature.float(), batch.ids, batch.infrared)
            losses["alignment"] = self.alignment_weight * alignment
        layers = [layer for layer in self.network.modules() if isinstance(layer, DecomposedConv2d)]
        if self.orthogonality and layers:
            losses["orthogonality"] = self.orthogonality * torch.stack([m.orthogonality() for m in layers]).sum()
        if self.leash and layers:
            losses["leash"] = self.leash * torch.stack([m.leash() for m in layers]).sum()
        return losses

    def _mixed_losses(
        self, batch: Batch, pure: Outputs, held_out: Batch | None, *, learning: bool
    ) -> dict[str, Tensor]:
        """w_m times the losses of mixed pictures; what the agent learns from them is kept for after the step."""
        v, i = modality_pairs(batch.ids, batch.infrared, cross_identity=self.cross_identity)
        if not len(v):
            return {}
        x_v, x_i, y_v, y_i = batch.images[v], batch.images[i], batch.ids[v], batch.ids[i]
        lam, steps = self._ratios(x_v, x_i, y_v, y_i, learning)
        mixed = self._mixed_outputs(self.network, self._mixed(x_v, x_i, lam), lam)
        share = lam.mean(1)
        losses = {"mixed_identity": self._identity_loss(mixed.logits, y_v)}
        if self.cross_identity:
            each = [identity_losses(mixed.logits, y, smoothing=self.smoothing) for y in (y_v, y_i)]
            losses["mixed_identity"] = (share * each[0] + (1 - share) * each[1]).mean()
        else:
            losses["mixed_triplet"] = self._triplet_loss(
                torch.cat([mixed.pooled, pure.pooled]), torch.cat([y_v, batch.ids])
            )
        with torch.no_grad():
            utility = self._utility(mixed, pure.pooled[v], pure.pooled[i], share, y_v, y_i)
            if len(steps) == 1 and self.judge is None and self.reward == "utility":
                steps = [replace(steps[0], reward=self._as_reward(utility))]
            before = None if held_out is None else self._loss_in_eval(held_out)
        self._mixing = _Mixing(lam.detach(), utility, steps, held_out, before)
        return {name: self.mix_weight * loss for name, loss in losses.items()}

    def _mixed(self, x_v: Tensor, x_i: Tensor, lam: Tensor) -> Tensor:
        return region_mixup(x_v, x_i, lam.unflatten(1, self.regions), soft=self.soft)

    # -------------------------------------------------------------------------------------------- ratios

    def _ratios(
        self, x_v: Tensor, x_i: Tensor, y_v: Tensor, y_i: Tensor, learning: bool
    ) -> tuple[Tensor, list[Transition]]:
        """lam [n, R], and the agent's steps towards it."""
        n, R = len(x_v), self.regions[0] * self.regions[1]
        if self.agent is not None:
            return self._rollout(self.agent, x_v, x_i, y_v, y_i, learning)
        if self.mixing == "constant":
            return torch.full((n, R), self.constant_ratio, device=x_v.device), []
        columns = R if self.mixing == "random" else 1
        drawn = rows_of_rank(n, lambda rows: torch.rand(rows, columns, generator=self._generator))
        return drawn.expand(n, R).to(x_v.device), []

    def _rollout(
        self, agent: MixingAgent, x_v: Tensor, x_i: Tensor, y_v: Tensor, y_i: Tensor, learning: bool
    ) -> tuple[Tensor, list[Transition]]:
        """T steps of the decision process; rewards are 0 where they are known later."""
        judge = self.network if self.judge is None else self.judge
        judged = self.reward == "utility" and (agent.options.horizon > 1 or self.judge is not None)
        with evaluating(judge), torch.autocast(x_v.device.type, enabled=False):
            light, dark = (self._regions(judge, x, kind) for x, kind in ((x_v, VISIBLE), (x_i, INFRARED)))
            p_v, p_i = (self._pooled(judge, x, kind) if judged else x for x, kind in ((x_v, VISIBLE), (x_i, INFRARED)))

            def seen(lam: Tensor) -> tuple[Tensor, Tensor]:
                """State and utility of ratios."""
                x_m = self._mixed(x_v, x_i, lam)
                share = lam.mean(1)
                between = self._regions(judge, x_m, MIXED, torch.stack([share, 1 - share], 1))
                state = torch.cat([light, dark, between, lam[..., None]], 2)
                if not judged:
                    return state, state.new_zeros(len(state))
                return state, self._utility(self._mixed_outputs(judge, x_m, lam), p_v, p_i, share, y_v, y_i)

            lam = agent.start(len(x_v))
            state, utility = seen(lam)
            steps = []
            for t in range(agent.options.horizon):
                with torch.set_grad_enabled(self.differentiable_ratios):
                    action = self._action(agent, state, learning)
                    lam = agent.ratios(lam, action)
                last = t + 1 == agent.options.horizon
                if last and not judged:
                    following, gained = state, utility
                else:
                    following, gained = seen(lam.detach())
                reward = gained if agent.options.horizon == 1 else gained - utility
                steps.append(Transition(state, action.detach(), self._as_reward(reward), None if last else following))
                state, utility = following, gained
        return lam, steps

    def _action(self, agent: MixingAgent, state: Tensor, learning: bool) -> Tensor:
        if self.differentiable_ratios:
            return agent.policy(state)
        return agent.anything(len(state)) if learning else agent.explore(state)

    def _regions(self, judge: nn.Module, x: Tensor, modality: int, mixture: Tensor | None = None) -> Tensor:
        """Means [n, R, c] of an early map over regions."""
        backbone: nn.Module = judge.backbone  # type: ignore[assignment]
        if modality != MIXED or not self.by_modality or self.mixed_path == "mix":
            with modality_context(modality, mixture):
                means = adaptive_avg_pool2d(early_map(backbone, x, self.state_stage), self.regions)
            return means.flatten(2).mT.float()
        return (self._regions(judge, x, VISIBLE) + self._regions(judge, x, INFRARED)) / 2

    def _pooled(self, judge: nn.Module, x: Tensor, modality: int) -> Tensor:
        with modality_context(modality):
            return judge(x).pooled  # type: ignore[no-any-return]

    # -------------------------------------------------------------------------------------------- rewards

    def _utility(
        self, mixed: Outputs, visible: Tensor, infrared: Tensor, share: Tensor, y_v: Tensor, y_i: Tensor
    ) -> Tensor:
        """U [n]; log P of two identities is weighted by the share of each."""
        log_p = log_softmax(mixed.logits.float(), 1)
        first, second = (log_p.gather(1, y[:, None])[:, 0] for y in (y_v, y_i))
        known = share * first + (1 - share) * second
        return mixing_utility(mixed.pooled, visible, infrared, known, beta=self.beta, distances=self.distances)

    def _as_reward(self, utility: Tensor) -> Tensor:
        if self.normalized_reward and len(utility) > 1:
            utility = (utility - utility.mean()) / utility.std().clamp_min(1e-6)
        return utility.clamp(-_REWARD_LIMIT, _REWARD_LIMIT)

    def _loss_in_eval(self, batch: Batch) -> Tensor:
        """L without mixing, of the network at test."""
        with evaluating(self.network):
            outputs = self._outputs(batch.images, batch.infrared.long())
            return self._identity_loss(outputs.logits, batch.ids) + self._triplet_loss(outputs.pooled, batch.ids)

    @torch.no_grad()
    def _follow(self, momentum: float) -> None:
        """The judge follows the network, with its statistics."""
        assert self.judge is not None
        momentum_update(list(self.judge.parameters()), list(self.network.parameters()), momentum)
        for behind, ahead in zip(self.judge.buffers(), self.network.buffers(), strict=True):
            behind.copy_(ahead)


def _halves(batch: Batch) -> tuple[Batch, Batch]:
    """The pictures of the first half of the identities of a batch, and those of the others."""
    identities = batch.ids.unique()
    first = torch.isin(batch.ids, identities[: (len(identities) + 1) // 2])
    halves = [
        Batch(batch.images[rows], batch.ids[rows], batch.cameras[rows], batch.domains[rows], batch.infrared[rows])
        for rows in (first, ~first)
    ]
    return halves[0], halves[1]
