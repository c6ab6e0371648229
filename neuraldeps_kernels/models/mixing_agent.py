"""Agent that chooses mixing ratios: deep deterministic policy gradient, or actor-critic with a Beta policy.

    s [B, R, S]   state: S numbers for each of R regions, the last of which is the ratio of the region so far, lam_t
    u [B, R]      action, in [-1, 1]
    T = 1         lam = low + (high - low) (u + 1) / 2: one choice, a bandit
    T > 1         lam_{t+1} = clip(lam_t + delta u_t, low, high), lam_0 = 0.5, t < T

    "ddpg"   y = r + gamma (1 - done) Q'(s', mu'(s')),   critic: min mean (Q(s, u) - y)^2,   actor: max mean Q(s, mu(s))
             targets theta' <- (1 - tau) theta' + tau theta; from a replay buffer; noise is added to what is done
    "a2c"    u = 2 v - 1, v ~ Beta(a(s), b(s)); advantage r + gamma (1 - done) V(s') - V(s); the newest transitions

The actor is one MLP for all regions, S -> 64 -> 1 (2 for Beta), the critic an MLP on the flattened state and action.
With several processes each acts on its own states; all learn alike from the transitions of all.

Source: "Continuous control with deep reinforcement learning" (arXiv 1509.02971) and "Asynchronous Methods for Deep
Reinforcement Learning" (arXiv 1602.01783); sizes and rates are our choice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, softplus

from neuraldeps_kernels.models.training import of_all_ranks, rank_and_ranks
from neuraldeps_kernels.ops.queue_contrast import momentum_update

ALGORITHMS = ("ddpg", "a2c")
MIDDLE = 0.5  # lam_0


@dataclass(frozen=True)
class AgentOptions:
    """Named as in the head of the file.

    Raises:
        ValueError: a value is out of range.
    """

    algorithm: str = "ddpg"
    horizon: int = 1  # T
    step: float = 0.5  # delta
    limits: tuple[float, float] = (0.1, 0.9)  # low, high
    hidden: int = 64
    discount: float = 0.9  # gamma
    target_rate: float = 0.005  # tau
    capacity: int = 10_000  # of the replay buffer, transitions
    batch_size: int = 128
    actor_lr: float = 1e-4
    critic_lr: float = 1e-3
    noise: float = 0.15  # standard deviation of exploration, in units of the ratio
    entropy_bonus: float = 0.01  # of the Beta policy
    centre_penalty: float = 0.0  # times (mean ratio - 0.5)^2 in the actor's loss: against ratios at their limits

    @classmethod
    def named(cls, options: Mapping[str, Any]) -> AgentOptions:
        """Options from a table of a configuration; ValueError for an unknown one."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise ValueError(f"unknown option {name!r} of the agent; known: {', '.join(known)}")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        return cls(**values)

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, not {self.algorithm!r}")
        for name in ("horizon", "hidden", "capacity", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        low, high = self.limits
        if not 0 <= low <= MIDDLE <= high <= 1 or low == high:
            raise ValueError(f"limits must be low and high with 0 <= low <= {MIDDLE} <= high <= 1, not {self.limits}")
        for name in ("discount", "target_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, not {getattr(self, name)}")
        for name in ("step", "actor_lr", "critic_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("noise", "entropy_bonus", "centre_penalty"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")


@dataclass(frozen=True)
class Transition:
    """What B states became; the last of T steps has no next state."""

    state: Tensor  # [B, R, S]
    action: Tensor  # [B, R]
    reward: Tensor  # [B]
    next_state: Tensor | None = None  # [B, R, S]


class ReplayBuffer:
    """Ring of the newest `capacity` rows of named tensors."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.count = capacity, 0  # count: rows ever pushed
        self.columns: dict[str, Tensor] = {}  # [capacity, ...]

    def __len__(self) -> int:
        return min(self.count, self.capacity)

    def push(self, **rows: Tensor) -> None:
        """Appends rows [n, ...], the same names each time."""
        n = len(next(iter(rows.values())))
        kept = min(n, self.capacity)
        for name, values in rows.items():
            if name not in self.columns:
                self.columns[name] = values.new_zeros(self.capacity, *values.shape[1:])
            column = self.columns[name]
            places = (self.count + n - kept + torch.arange(kept, device=column.device)) % self.capacity
            column[places] = values[n - kept :].detach().to(column.dtype)
        self.count += n

    def sample(self, number: int, generator: torch.Generator) -> dict[str, Tensor]:
        """`number` rows, evenly and with repetition; `generator` is of the CPU."""
        rows = torch.randint(len(self), (number,), generator=generator)
        return {name: column[rows.to(column.device)] for name, column in self.columns.items()}

    def state_dict(self) -> dict[str, Any]:
        """Count and filled rows."""
        return {"count": self.count, "rows": {name: column[: len(self)] for name, column in self.columns.items()}}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.count, self.columns = int(state["count"]), {}
        for name, rows in state["rows"].items():
            column = torch.zeros(self.capacity, *rows.shape[1:], dtype=rows.dtype, device=device)
            column[: len(rows)] = rows.to(device)
            self.columns[name] = column


class MixingAgent(nn.Module):
    """See the head of the file. Its random numbers, replay and optimisers are part of its state dict.

    Args:
        num_regions, state_size: R, S.
        options: AgentOptions.
        seed: of the parameters, of exploration and of the draws from the replay.
    """

    def __init__(
        self, num_regions: int, state_size: int, options: AgentOptions | None = None, *, seed: int = 0
    ) -> None:
        super().__init__()
        self.options = o = AgentOptions() if options is None else options
        self.num_regions, self.state_size = num_regions, state_size
        ddpg = o.algorithm == "ddpg"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.actor = _mlp(state_size, o.hidden, 1 if ddpg else 2)
            self.critic = _mlp(num_regions * (state_size + ddpg), o.hidden, 1)
        if ddpg:
            self.target_actor, self.target_critic = (
                copy.deepcopy(network).requires_grad_(False) for network in (self.actor, self.critic)
            )
        self.replay = ReplayBuffer(o.capacity)
        self._newest: list[Transition] = []  # since the last update, for "a2c"
        self._optimizers = {
            "actor": torch.optim.Adam(self.actor.parameters(), o.actor_lr),
            "critic": torch.optim.Adam(self.critic.parameters(), o.critic_lr),
        }
        self._generator = torch.Generator().manual_seed(seed)

    # -------------------------------------------------------------------------------------------- acting

    def start(self, number: int) -> Tensor:
        """lam_0 [number, R]."""
        return torch.full((number, self.num_regions), MIDDLE, device=self._device())

    def policy(self, state: Tensor) -> Tensor:
        """Action [B, R] of states, without noise: mu(s), or the mean of the Beta policy."""
        if self.options.algorithm == "ddpg":
            return self._mu(self.actor, state)
        a, b = self._beta(state)
        return (a - b) / (a + b)

    @torch.no_grad()
    def explore(self, state: Tensor) -> Tensor:
        """Action [B, R] with noise, or drawn from the Beta policy."""
        low, high = self.options.limits
        if self.options.algorithm == "ddpg":
            scale = 2 / (high - low) if self.options.horizon == 1 else 1 / self.options.step
            noise = rows_of_rank(len(state), lambda n: torch.randn(n, self.num_regions, generator=self._generator))
            return (self.policy(state) + scale * self.options.noise * noise.to(state.device)).clamp(-1, 1)
        a, b = (parameter.cpu() for parameter in self._beta(state))
        with torch.random.fork_rng(devices=[]):  # torch.distributions takes no generator
            torch.manual_seed(int(torch.randint(2**62, (), generator=self._generator)) + rank_and_ranks()[0])
            drawn = torch.distributions.Beta(a, b).sample()
        return (2 * drawn - 1).to(state.device)

    def anything(self, number: int) -> Tensor:
        """Actions [number, R], even in [-1, 1]."""
        drawn = rows_of_rank(number, lambda n: torch.rand(n, self.num_regions, generator=self._generator))
        return (2 * drawn - 1).to(self._device())

    def ratios(self, lam: Tensor, action: Tensor) -> Tensor:
        """lam_{t+1} from lam_t and u_t, both [B, R]."""
        low, high = self.options.limits
        if self.options.horizon == 1:
            return low + (high - low) * (action + 1) / 2
        return (lam + self.options.step * action).clamp(low, high)

    # -------------------------------------------------------------------------------------------- learning

    def remember(self, transition: Transition) -> None:
        """Takes B transitions to learn from; every process calls this with as many."""
        transition = Transition(
            *(None if t is None else of_all_ranks(t.detach()) for t in vars(transition).values())  # type: ignore[arg-type]
        )
        if self.options.algorithm == "a2c":
            self._newest.append(transition)
            return
        rows = {"state": transition.state, "action": transition.action, "reward": transition.reward}
        if self.options.horizon > 1:
            done = transition.next_state is None
            rows["next_state"] = transition.state if transition.next_state is None else transition.next_state
            rows["going_on"] = torch.full_like(transition.reward, float(not done))
        self.replay.push(**rows)

    def update(self) -> dict[str, float]:
        """One step of critic and actor; {} where too little is known. Returns their losses."""
        with torch.enable_grad(), torch.autocast(self._device().type, enabled=False):
            if self.options.algorithm == "a2c":
                losses = self._a2c()
            elif len(self.replay) < self.options.batch_size:
                return {}
            else:
                losses = self._ddpg(self.replay.sample(self.options.batch_size, self._generator))
        return {name: float(loss.detach()) for name, loss in losses.items()}

    def _ddpg(self, known: dict[str, Tensor]) -> dict[str, Tensor]:
        state, action, target = known["state"], known["action"], known["reward"]
        if "next_state" in known:
            with torch.no_grad():
                after = self._mu(self.target_actor, known["next_state"])
                value = _value(self.target_critic, known["next_state"], after)
                target = target + self.options.discount * known["going_on"] * value
        critic_loss = mse_loss(_value(self.critic, state, action), target)
        self._descend("critic", critic_loss)
        chosen = self._mu(self.actor, state)
        actor_loss = -_value(self.critic, state, chosen).mean() + self._off_centre(state, chosen)
        self._descend("actor", actor_loss)
        for target_network, network in ((self.target_actor, self.actor), (self.target_critic, self.critic)):
            momentum_update(list(target_network.parameters()), list(network.parameters()), 1 - self.options.target_rate)
        return {"critic": critic_loss, "actor": actor_loss}

    def _a2c(self) -> dict[str, Tensor]:
        newest, self._newest = self._newest, []
        if not newest:
            return {}
        state, action = torch.cat([t.state for t in newest]), torch.cat([t.action for t in newest])
        with torch.no_grad():
            ahead = [
                torch.zeros_like(t.reward) if t.next_state is None else _value(self.critic, t.next_state)
                for t in newest
            ]
            target = torch.cat([t.reward for t in newest]) + self.options.discount * torch.cat(ahead)
        value = _value(self.critic, state)
        critic_loss = mse_loss(value, target)
        self._descend("critic", critic_loss)
        policy = torch.distributions.Beta(*self._beta(state))
        inside = ((action + 1) / 2).clamp(1e-4, 1 - 1e-4)
        gain = policy.log_prob(inside).sum(1) * (target - value.detach())
        actor_loss = (
            -gain.mean()
            - self.options.entropy_bonus * policy.entropy().sum(1).mean()
            + self._off_centre(state, self.policy(state))
        )
        self._descend("actor", actor_loss)
        return {"critic": critic_loss, "actor": actor_loss}

    def _off_centre(self, state: Tensor, action: Tensor) -> Tensor:
        """Penalty on mean ratios away from 0.5."""
        ratio = self.ratios(state[..., -1], action).mean(1)
        return self.options.centre_penalty * (ratio - MIDDLE).square().mean()

    def _descend(self, name: str, loss: Tensor) -> None:
        """A step of one optimiser; no other parameter gets a gradient."""
        parameters = list(getattr(self, name).parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        self._optimizers[name].step()
        self._optimizers[name].zero_grad()

    # -------------------------------------------------------------------------------------------- networks, state

    def _mu(self, actor: nn.Module, state: Tensor) -> Tensor:
        return torch.tanh(actor(state)[..., 0])

    def _beta(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """a and b [B, R] of the policy, above 1: one mode."""
        a, b = (1 + softplus(self.actor(state))).unbind(-1)
        return a, b

    def _device(self) -> torch.device:
        return next(self.actor.parameters()).device

    def get_extra_state(self) -> dict[str, Any]:
        return {
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()},
            "replay": self.replay.state_dict(),
            "generator": self._generator.get_state(),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.replay.load_state_dict(state["replay"], self._device())
        self._generator.set_state(state["generator"].cpu())


def rows_of_rank(number: int, draw: Callable[[int], Tensor]) -> Tensor:
    """`number` random rows of this process; all processes draw those of all, so that their generators stay alike."""
    rank, ranks = rank_and_ranks()
    return draw(number * ranks)[rank * number : (rank + 1) * number]


def _value(critic: nn.Module, state: Tensor, action: Tensor | None = None) -> Tensor:
    """Q(s, u) or V(s) [B]; the one number of an action weighs as much as the S of a state."""
    known = state if action is None else torch.cat([state, state.shape[2] ** 0.5 * action[..., None]], 2)
    return critic(known.flatten(1))[:, 0]  # type: ignore[no-any-return]


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two layers, the last of which starts near 0: actions in the middle, values of nothing learned yet."""
    network = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
    nn.init.uniform_(network[2].weight, -3e-3, 3e-3)  # type: ignore[arg-type]
    nn.init.zeros_(network[2].bias)  # type: ignore[arg-type]
    return network
