"""The node's GPUs and network adapters as its driver reports them: links, memory, clocks, ports.

nvidia-smi's texts are not promised to stay, so what is not understood is said to be unchecked.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from retro_mcore.stages.doctor.findings import Finding, note, ok, warning

AREA = "device"
_SECONDS = 60.0
_RESET = "Reset the GPU or reboot the node; if it comes back, leave the node out"
_SPACE = "Clean, cool or power the node (nvidia-smi -q -d PERFORMANCE), or leave it out"
#: Field of nvidia-smi, what it means if it is not zero, and what to do about it. Of GPUs before
#: Ampere pages are retired, of later ones rows are remapped.
_FAULTS: tuple[tuple[str, str, str], ...] = (
    ("ecc.errors.uncorrected.volatile.total", "uncorrected memory errors (ECC)", _RESET),
    ("retired_pages.pending", "memory pages to be retired", _RESET),
    ("remapped_rows.pending", "memory rows to be remapped", _RESET),
    ("remapped_rows.failure", "memory rows that could not be remapped", "Replace the GPU"),
)
#: Bits of the reasons for lower clocks that tell of trouble. Others are those of an idle GPU, of
#: clocks that were set, and of the power limit, which full load reaches.
_THROTTLED = {
    0x8: "a slowdown by the hardware",
    0x20: "heat, by the driver",
    0x40: "heat, by the hardware",
    0x80: "the power supply",
}
_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # newer, older name
_PERSISTENCE = "persistence_mode"
#: Others are no, 0, [N/A], and what this user may not know.
_TROUBLE = re.compile(r"[1-9]\d*|yes|.*(error|reset).*", re.IGNORECASE)


def check_hardware(cuda: bool) -> list[Finding]:
    """Check the GPUs of this node and the links between them; nothing for a run on the CPU."""
    if not cuda:
        return []
    if shutil.which("nvidia-smi") is None:
        return [note(AREA, "nvidia-smi", "is not there: GPU links, memory and clocks not checked")]
    fields = ["index", _PERSISTENCE, *(name for name, _, _ in _FAULTS)]
    columns = {name: values for name in fields if (values := _column(name)) is not None}
    reasons = next((found for name in _REASONS if (found := _column(name)) is not None), None)
    if reasons is not None:
        columns[_REASONS[0]] = reasons
    return [*judge_gpus(columns), *judge_links(_ask("topo", "-m"), _ask("nvlink", "--status"))]


def judge_gpus(columns: Mapping[str, Sequence[str]]) -> Iterator[Finding]:
    """Findings about each GPU.

    Args:
        columns: Values of nvidia-smi's fields, one for each GPU; those that it does not know are
            left out.
    """
    for name, what, fix in _FAULTS:
        for gpu, value in _by_gpu(columns, name):
            if _TROUBLE.fullmatch(value):
                yield warning(AREA, f"GPU {gpu}", f"{what}: {value}", fix)
    for gpu, value in _by_gpu(columns, _REASONS[0]):
        bits = int(value, 16) if re.fullmatch(r"0x[0-9a-fA-F]+", value) else 0
        told = [reason for bit, reason in _THROTTLED.items() if bits & bit]
        if told:
            yield warning(AREA, f"GPU {gpu}", f"clocks are lowered: {', '.join(told)}", _SPACE)
    off = [gpu for gpu, value in _by_gpu(columns, _PERSISTENCE) if value.lower() == "disabled"]
    if off:
        found = f"off for GPU {', '.join(off)}: the driver unloads when no process uses the GPU"
        yield note(AREA, "persistence mode", f"{found}; nvidia-persistenced keeps it")
    asked = [*(name for name, _, _ in _FAULTS), _REASONS[0]]
    unknown = [name for name in asked if name not in columns]
    if unknown:
        yield note(AREA, "nvidia-smi", f"does not tell {', '.join(unknown)}: not checked")


def judge_links(topology: str | None, status: str | None) -> Iterator[Finding]:
    """Findings about the links between the GPUs of this node.

    Args:
        topology: Output of `nvidia-smi topo -m`, if there was one.
        status: Output of `nvidia-smi nvlink --status`, likewise.
    """
    paths = gpu_paths(topology or "")
    down = inactive_links(status or "")
    if down and (len(paths) > 1 or len(down) > 1):
        named = "; ".join(f"GPU {gpu}: {what}" for gpu, what in down.items())
        fix = "Look at dmesg (Xid 74) and the fabric manager, or leave the node out"
        yield warning(AREA, "NVLink", f"links are down ({named})", fix)
    if not paths:
        yield note(AREA, "links between GPUs", "nvidia-smi topo -m tells none: not checked")
        return
    if len(paths) == 1:
        return
    pairs = {
        (min(one, other), max(one, other)): path
        for one, row in paths.items()
        for other, path in row.items()
        if one != other
    }
    kinds = sorted(set(pairs.values()))
    told = f"{len(paths)} GPUs: {', '.join(kinds)}"
    linked = {pair for pair, path in pairs.items() if path.startswith("NV")}
    if linked and len(kinds) > 1:
        best = max(kinds, key=_width)
        slow = [f"{one}-{other} {path}" for (one, other), path in pairs.items() if path != best]
        found = f"{told}; fewer NVLinks or none between {', '.join(slow[:8])}"
        yield note(AREA, "links between GPUs", f"{found}: keep tensor parallelism among the others")
    elif linked:
        yield ok(AREA, "links between GPUs", told)
    else:
        yield note(AREA, "links between GPUs", f"{told}; no NVLink: tensor parallelism is slow")


def _width(path: str) -> int:
    return int(path[2:]) if re.fullmatch(r"NV\d+", path) else 0


def gpu_paths(text: str) -> dict[int, dict[int, str]]:
    """How GPUs reach one another, by GPU: NV18 (eighteen NVLinks), PIX, PXB, PHB, NODE or SYS.

    Args:
        text: Output of `nvidia-smi topo -m`.
    """
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in text.splitlines()]
    columns = next((line.split() for line in lines if line.split()[:1] == ["GPU0"]), [])
    numbers = [int(name[3:]) for name in columns if re.fullmatch(r"GPU\d+", name)]
    rows = {}
    for line in lines:
        words = line.split()
        if len(words) > len(numbers) and re.fullmatch(r"GPU\d+", words[0]) and "X" in words:
            rows[int(words[0][3:])] = dict(zip(numbers, words[1:], strict=False))
    return rows


def inactive_links(text: str) -> dict[int, str]:
    """GPUs with NVLinks that are down, and which.

    Args:
        text: Output of `nvidia-smi nvlink --status`.
    """
    found: dict[int, list[str]] = {}
    gpu, whole = -1, {}
    for line in text.splitlines():
        if head := re.match(r"\s*GPU (\d+):", line):
            gpu = int(head[1])
        if "all links are inactive" in line.lower():
            whole[gpu] = "all"
        link = re.match(r"\s*Link (\d+):\s*(\S*)", line)
        if link and re.fullmatch(r"<?(inactive|disabled|down)>?|0(\.0+)?", link[2].lower()):
            found.setdefault(gpu, []).append(link[1])
    return {**{each: f"link {', '.join(links)}" for each, links in found.items()}, **whole}


def check_ports(folder: Path = Path("/sys/class/infiniband")) -> Iterator[Finding]:
    """Check InfiniBand's (or RoCE's) ports, where the node has some."""
    states = {}
    for path in sorted(folder.glob("*/ports/*/state")):
        try:
            state = path.read_text(encoding="utf-8").partition(":")[2].strip()
        except OSError:
            continue
        states[f"{path.parents[2].name}/{path.parent.name}"] = state
    if not states:
        return
    active = [port for port, state in states.items() if state == "ACTIVE"]
    down = [f"{port} {state}" for port, state in states.items() if state != "ACTIVE"]
    if not active:
        fix = "Check cables, switch and subnet manager (ibstat)"
        yield warning("network", "InfiniBand", f"no port is active: {', '.join(down)}", fix)
    elif down:  # adapters may be there without a cable
        found = f"{len(active)} ports are active; not so {', '.join(down)}"
        yield note("network", "InfiniBand", f"{found}. NCCL_IB_HCA names those to use")
    else:
        yield ok("network", "InfiniBand", f"{len(active)} ports are active")


def _by_gpu(columns: Mapping[str, Sequence[str]], name: str) -> list[tuple[str, str]]:
    values = columns.get(name, [])
    names = columns.get("index", [])
    if len(names) != len(values):
        names = [str(number) for number in range(len(values))]
    return list(zip(names, values, strict=True))


def _column(field: str) -> list[str] | None:
    """A field's value for each GPU; None if nvidia-smi does not know the field.

    Fields are asked for one by one: a single unknown one fails a whole query.
    """
    text = _ask(f"--query-gpu={field}", "--format=csv,noheader")
    if text is None and field.startswith("remapped_rows."):
        text = _ask(f"--query-remapped-rows={field}", "--format=csv,noheader")
    return None if text is None else [line.strip() for line in text.splitlines() if line.strip()]


def _ask(*arguments: str) -> str | None:
    """Output of nvidia-smi; None if it fails, or does not end."""
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
