"""Whose fault is it? Who waits for whom, from the ranks' trails and what became of their processes. Pure."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_aquila.observe.processes import State
from megatron_aquila.observe.trails import Crumb, RankTrail, age


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that explains why the run does not go on. ``ranks`` are those at fault, as far as can be told."""

    ranks: tuple[int, ...]
    text: str


def diagnose(trails: Sequence[RankTrail], states: Mapping[int, State | None]) -> list[Finding]:
    """What holds the run up, the most certain first; empty where nothing does.

    ``states`` are those of the ranks' processes, None where it cannot be told from here. A transfer that ranks do
    differently comes first, then processes that cannot run, then ranks that others wait for while they wait for none.
    Where all wait in a circle, those that the most wait for are named.
    """
    world, here = trails[0].world, {trail.rank for trail in trails}
    findings = _differing(trails)
    if missing := sorted(set(range(world)) - here):
        findings.append(
            Finding(
                ranks=tuple(missing),
                text=f"{_ranks(missing)} of {world} left no breadcrumbs here: not started, or on a disk of their own",
            )
        )
    alive = any(state in ("runs", "stopped") for state in states.values())
    for trail in trails:
        if states[trail.rank] == "stopped":
            text = f"rank {trail.rank} cannot run: its process {trail.pid} is stopped (SIGSTOP, or a debugger)"
            findings.append(Finding(ranks=(trail.rank,), text=f"{text}; it goes on with: kill -CONT {trail.pid}"))
        elif states[trail.rank] == "gone" and alive and not trail.has_ended:
            text = f"rank {trail.rank} is dead: its process {trail.pid} is gone"
            findings.append(Finding(ranks=(trail.rank,), text=text))
    return findings if findings else _behind(trails)


def _differing(trails: Sequence[RankTrail]) -> list[Finding]:
    """The first transfer that ranks of one channel do differently, and the fewest who do."""
    done: dict[tuple[str, int], dict[int, Crumb]] = defaultdict(dict)
    for trail in trails:
        for place, crumb in trail.crumbs.items():
            done[place][trail.rank] = crumb
    apart = {place: crumbs for place, crumbs in done.items() if len({crumb.what() for crumb in crumbs.values()}) > 1}
    if not apart:
        return []
    place = min(apart, key=lambda one: min(crumb.begun for crumb in apart[one].values()))
    crumbs, names = apart[place], {key: channel.name for trail in trails for key, channel in trail.channels.items()}
    counts = Counter(crumb.what() for crumb in crumbs.values())
    most, number = counts.most_common(1)[0]
    odd = {rank: crumb.what() for rank, crumb in crumbs.items() if crumb.what() != most}
    where, told = f"{names[place[0]]} #{place[1]}", ", ".join(f"rank {rank} does {text}" for rank, text in odd.items())
    others = sorted(set(crumbs) - set(odd))
    even = "; which of the two is wrong cannot be told from here" if 2 * number == len(crumbs) else ""
    ranks = tuple(sorted(crumbs if even else odd))
    does = "does" if len(others) == 1 else "do"
    return [Finding(ranks=ranks, text=f"ranks differ in {where}: {told}, but {_ranks(others)} {does} {most}{even}")]


def _behind(trails: Sequence[RankTrail]) -> list[Finding]:
    """Ranks that others wait for and that wait for nobody; in a circle, the one that most wait for."""
    waits = [(trail, crumb) for trail in trails if (crumb := trail.waiting) is not None]
    if not waits:  # on a GPU the host may wait for the device instead: then whoever has begun less
        waits = [(trail, crumb) for trail in trails if (crumb := trail.newest) is not None and crumb.ended is None]
    awaited: dict[int, dict[int, Crumb]] = defaultdict(dict)  # rank -> who waits for it, and in what
    waiters = set()
    for trail, crumb in waits:
        for other in trails:
            begun = other.begun(trail.channels[crumb.key])
            if other.rank != trail.rank and begun is not None and begun < crumb.sequence:
                awaited[other.rank][trail.rank] = crumb
                waiters.add(trail.rank)
    if not awaited:
        return []
    roots = set(awaited) - waiters
    if not roots:
        most = max(len(who) for who in awaited.values())
        roots = {rank for rank, who in awaited.items() if len(who) == most}
    names = {key: channel.name for trail in trails for key, channel in trail.channels.items()}
    late = [trail for trail in trails if trail.rank in roots]
    return [_late(trail, awaited[trail.rank], names, in_circle=trail.rank in waiters) for trail in late]


def _late(trail: RankTrail, who: Mapping[int, Crumb], names: Mapping[str, str], *, in_circle: bool) -> Finding:
    """One rank that has not come to where others wait for it."""
    crumb = min(who.values(), key=lambda one: one.waits_since or one.begun)
    name, newest = names[crumb.key], trail.newest
    text = f"rank {trail.rank} is behind: {_ranks(who)} {'waits' if len(who) == 1 else 'wait'} since "
    text += f"{age(crumb.waits_since or crumb.begun)} in {name} #{crumb.sequence}, {crumb.what()}; "
    text += f"rank {trail.rank} is in step {trail.step} ({trail.phase})"
    if newest is not None:
        text += f", its last transfer {names[newest.key]} #{newest.sequence}, {newest.what()}"
    if in_circle:
        text += "; all wait in a circle: the order of transfers differs between ranks"
    return Finding(ranks=(trail.rank,), text=text)


def _ranks(ranks: Iterable[int]) -> str:
    listed = sorted(ranks)
    shown = ", ".join(map(str, listed[:8])) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
    return f"rank{'' if len(listed) == 1 else 's'} {shown}"
