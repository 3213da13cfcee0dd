"""`fleetune launch` on machines by name: one command per node, printed, or started over ssh and held on a leash.

What goes to a node goes through the standard input of its shell: no argument list shows it, no file keeps it.
"""

from __future__ import annotations

import os
import random
import secrets
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from launcher.command.launch_here import run_chain
from launcher.command.options import Via
from launcher.errors import SpecError, UserError

if TYPE_CHECKING:
    from launcher.emit.argv import NodeStart
    from launcher.emit.hosts import Host
    from launcher.job import JobSpec

HEAD = "FIRST_NODE"
"""Stands for the first machine where none is named."""


def launch_on_hosts(
    spec: JobSpec, hosts: tuple[Host, ...], spec_path: Path, overrides: list[str], via: Via, dry_run: bool
) -> None:
    from launcher.emit.argv import job_words
    from launcher.emit.environment import allowed, carried

    if spec.launch.remote == "pdsh":
        overrides = [override for override in overrides if not override.startswith("launch.")]
    job = job_words(str(spec_path.absolute()), tuple(overrides))
    names = allowed(spec.launch.environment)
    environment = carried(os.environ, names) | _threads(spec)
    starts = node_starts(spec, hosts, via)
    if dry_run:
        typer.echo(_shown(spec, hosts, starts, job, environment))
        return
    if not hosts:
        way_out = (
            "name the machines with --hosts or --hostfile, run the commands that --dry-run prints, or use --via slurm"
        )
        raise UserError(
            "cluster.nodes", spec.cluster.nodes, "is more than this machine, and no others are named", way_out
        )
    if spec.launch.remote == "pdsh":
        if via is not Via.deepspeed:
            raise SpecError("launch.remote", "pdsh", "is DeepSpeed's runner", "add --via deepspeed, or use ssh")
        _check_reachable(hosts, spec.launch.ssh_options)
        raise typer.Exit(run_chain(spec, via.value, _names(hosts), lambda _: _by_pdsh(spec, hosts, job), told=False))
    _check_reachable(hosts, spec.launch.ssh_options)

    def start(_: object) -> int:
        there = _check_reachable(hosts, spec.launch.ssh_options, spec.launch.min_nodes)
        fresh = node_starts(spec, there, via)  # another port and name: nobody of an earlier attempt can join
        return _on_leash(there, fresh, job, environment, spec.launch.ssh_options)

    raise typer.Exit(run_chain(spec, via.value, _names(hosts), start, told=False))


def _names(hosts: tuple[Host, ...]) -> tuple[str, ...]:
    return tuple(host.address for host in hosts)


def _threads(spec: JobSpec) -> dict[str, str]:
    """Machines are alike: this one's cores stand for theirs, unless the caller said it."""
    if spec.cluster.name != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // spec.cluster.gpus_per_node))}


def node_starts(spec: JobSpec, hosts: tuple[Host, ...], via: Via) -> list[NodeStart]:
    """One per node, in the order of ranks. Raises `SpecError` where the machines differ or are not as many as planned."""
    from launcher.emit.argv import NodeStart, world_info
    from launcher.emit.hosts import ranks_per_host

    nodes, smallest = spec.cluster.nodes, spec.launch.min_nodes
    count_fits = len(hosts) == nodes or (smallest is not None and smallest <= len(hosts) <= nodes)
    if hosts and not (count_fits and ranks_per_host(hosts) == spec.cluster.gpus_per_node):
        found = f"{len(hosts)} machines with {ranks_per_host(hosts)} slots each"
        rule = f"is planned, and {found} are named"
        way_out = f"set cluster.nodes={len(hosts)} and cluster.gpus_per_node={ranks_per_host(hosts)}, or name others"
        raise SpecError("cluster", f"{spec.cluster.nodes} x {spec.cluster.gpus_per_node}", rule, way_out)
    if smallest is not None and (smallest > nodes or via is Via.deepspeed):
        rule = f"is more than cluster.nodes {nodes}" if smallest > nodes else "is torchrun's, and via is deepspeed"
        raise SpecError("launch.min_nodes", smallest, rule, "lower it, or leave it out")
    count = str(nodes) if smallest is None else f"{smallest}:{nodes}"
    # Below 32768, where Linux hands out ports of its own accord; a draw, since the first node is not asked beforehand.
    port, run_id = 20000 + 2 * random.SystemRandom().randrange(6000), f"fleetune-{secrets.token_hex(4)}"
    head = hosts[0].address if hosts else HEAD
    info = world_info(hosts) if via is Via.deepspeed and hosts else ""
    launcher = "deepspeed" if via is Via.deepspeed else "torchrun"
    ranks = spec.cluster.gpus_per_node
    return [NodeStart(count, node, ranks, head, port, run_id, launcher, info) for node in range(len(hosts) or nodes)]  # type: ignore[arg-type]


def _shown(
    spec: JobSpec, hosts: tuple[Host, ...], starts: list[NodeStart], job: tuple[str, ...], environment: dict[str, str]
) -> str:
    from launcher.emit.environment import shown

    lines = ["# environment of the ranks: what is set of the allow-list", shown(environment)]
    if spec.launch.remote == "pdsh" and hosts:
        return "\n".join([*lines, "", "# command", shlex.join(pdsh_argv(spec, hosts, job, Path("HOSTFILE")))])
    if not hosts:
        lines.append(f"\n# one command per node, started there in {Path.cwd()}; put the first node's name for {HEAD}")
    for start in starts:
        where = hosts[start.node].name if hosts else f"node {start.node}"
        lines += [f"\n# {where}", shlex.join(start.argv(sys.executable, job))]
    return "\n".join(lines)


def node_script(start: NodeStart, job: tuple[str, ...], environment: dict[str, str], workdir: str) -> str:
    """What the shell of a node reads; its standard input stays open behind it as the leash of `node.py`."""
    missing = shlex.quote(f"error: {workdir} is not on ")
    lines = [f'cd -- {shlex.quote(workdir)} || {{ echo {missing}"$(uname -n)" >&2; exit 2; }}']
    lines += [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    argv = start.argv(sys.executable, ("--leash", *job))
    python = shlex.quote(sys.executable)
    lines.append(f'[ -x {python} ] || {{ echo error: {python} is not on "$(uname -n)" >&2; exit 2; }}')
    return "\n".join([*lines, f"exec {shlex.join(argv)}", ""])


def ssh_argv(host: Host, options: tuple[str, ...]) -> list[str]:
    """BatchMode: no password is asked for. A machine whose power was cut is found within 15 s."""
    words = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15"]
    words += ["-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3", *options]
    return [*words, "--", host.name, "bash -s"]


def _check_reachable(
    hosts: tuple[Host, ...], options: tuple[str, ...], smallest: int | None = None
) -> tuple[Host, ...]:
    """All at once, so that every machine that cannot be reached is named; with `smallest`, that many are enough."""
    from concurrent.futures import ThreadPoolExecutor

    from launcher.errors import Problem
    from launcher.spawn import run_captured

    def why_not(host: Host) -> str | None:
        try:
            done = run_captured([*ssh_argv(host, options)[:-1], "true"])
        except FileNotFoundError:
            return "ssh is not installed here"
        return None if done.returncode == 0 else " ".join(done.stderr.split()) or f"ssh ended with {done.returncode}"

    with ThreadPoolExecutor(max_workers=64) as pool:
        reasons = list(pool.map(why_not, hosts))
    problems = [
        Problem(
            "launch.hosts", host.name, f"cannot be reached: {reason}", "let `ssh HOST true` work without a password"
        )
        for host, reason in zip(hosts, reasons, strict=True)
        if reason is not None
    ]
    there = tuple(host for host, reason in zip(hosts, reasons, strict=True) if reason is None)
    if problems and len(there) < (smallest or len(hosts)):
        raise UserError.several(problems)
    return there


def _on_leash(
    hosts: tuple[Host, ...],
    starts: list[NodeStart],
    job: tuple[str, ...],
    environment: dict[str, str],
    options: tuple[str, ...],
) -> int:
    """Start every node, hand stop signals on, and come back when all have left: the highest of their codes."""
    from launcher.spawn import Leash

    scripts = [node_script(start, job, environment, str(Path.cwd())) for start in starts]
    with Leash([(ssh_argv(host, options), script) for host, script in zip(hosts, scripts, strict=True)]) as leash:
        while None in (codes := leash.codes()):
            time.sleep(0.2)
            if not starts[0].is_elastic and any(code not in (None, 0) for code in codes):
                leash.take_down_later()
    ended = [code or 0 for code in codes]
    return min(ended) if starts[0].is_elastic else max(ended)  # elastic: whoever is left has done the work


def pdsh_argv(spec: JobSpec, hosts: tuple[Host, ...], job: tuple[str, ...], hostfile: Path) -> list[str]:
    """DeepSpeed's own runner over pdsh, as it is: it hands no stop signal on, and compares no nodes.

    It quotes nothing, so words that a shell would read otherwise are refused. How ranks are reached is not their matter.
    """
    from launcher.emit.argv import RUN_FILE

    words = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--launcher", "pdsh"]
    words += ["--log_level", "warning", "--force_multi", "--no_ssh_check", "--master_addr", hosts[0].address]
    words += ["--master_port", str(20000 + 2 * random.SystemRandom().randrange(6000)), str(RUN_FILE), *job]
    plain = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789@%+=:,./_-")
    for word in (str(Path.cwd()), *words):
        if set(word) - plain:
            rule = "holds characters that DeepSpeed's pdsh runner hands to a shell as they are"
            raise SpecError("launch.remote", word, rule, "use launch.remote=ssh, which quotes, or rename")
    return words


def _by_pdsh(spec: JobSpec, hosts: tuple[Host, ...], job: tuple[str, ...]) -> int:
    """Filters are carried out already: the runner gets a hostfile of what is left."""
    from launcher.attempt.records import clear_records
    from launcher.emit.environment import allowed, carried, is_secret
    from launcher.spawn import has_program, run_until_done

    if not has_program("pdsh"):
        raise UserError("launch.remote", "pdsh", "is not installed here", "install it, or use launch.remote=ssh")
    output_dir = Path(spec.output_dir).absolute()
    clear_records(output_dir)
    hostfile = output_dir / "hostfile"
    hostfile.write_text("".join(f"{host.name} slots={len(host.slots)}\n" for host in hosts))
    told = carried(os.environ, allowed(spec.launch.environment)) | _threads(spec)
    held_back = [name for name in told if is_secret(name)]
    if held_back:
        names = ", ".join(held_back)
        typer.echo(
            f"not sent by pdsh, which would show them on a command line: {names}; launch.remote=ssh sends them",
            err=True,
        )
    (output_dir / "deepspeed.env").write_text(
        "".join(f"{name}={value}\n" for name, value in told.items() if name not in held_back and "\n" not in value)
    )
    # The runner puts on pdsh's command line whatever begins like this: a secret must not be there to find.
    silenced = {name: "" for name in os.environ if is_secret(name)}
    told = {
        "DS_ENV_FILE": str(output_dir / "deepspeed.env"),
        "PDSH_SSH_ARGS_APPEND": shlex.join(spec.launch.ssh_options),
    }
    return run_until_done(pdsh_argv(spec, hosts, job, hostfile), {**silenced, **told})
