"""Two hosts on one machine, and what can go wrong between them.

    sudo .venv/bin/python tests/by_hand/two_hosts.py               # all: about 10 minutes
    sudo .venv/bin/python tests/by_hand/two_hosts.py cut_for_good  # one scenario

Needs root and `ip` (iproute2). The hosts are network namespaces, connected by a virtual cable:

    host-a  10.77.0.1  eth-a ------------- eth-b  10.77.0.2  host-b
    torchrun, 1 worker      (veth pair)      torchrun, 1 worker

Each scenario (a function below) trains train_gpt2.py on both hosts with Gloo, into a shared run
folder, while something happens to them. The log must equal that of a single process: every step
once, losses within 1e-4.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from conftest import TEXTS, command, ok  # noqa: E402

HOSTS = {"a": "10.77.0.1", "b": "10.77.0.2"}
PORT = 29400
STEPS = 200
TIMEOUT = 35  # seconds that a worker waits for the other one

RUN = "--n_layer 4 --n_head 4 --n_embd 64 --block_size 64".split()
RUN += f"--B 2 --T 64 --total_batch_size 512 --max_steps {STEPS} --warmup_steps 10".split()
RUN += "--val_every 50 --val_tokens 2000 --sample_every 0 --hellaswag_every 0".split()
RUN += f"--rolling_every 10 --timeout {TIMEOUT} --device cpu --dtype float32".split()

os.environ["OMP_NUM_THREADS"] = "1"
# Without it, a launcher that was started again could not join the other one.
os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"


# ---------------------------------------------------------------------------------------------
# Network


def ip(*words: str):
    subprocess.run(["ip", *words], check=True)


def connect_hosts():
    for host in HOSTS:
        name = f"host-{host}"
        ip("netns", "add", name)
        ip("-n", name, "link", "set", "lo", "up")
        # torchrun waits for a vanished host until TCP gives up. With Linux's default of 15 retries
        # that takes about 15 minutes, with 7 retries 51 s.
        ip("netns", "exec", name, "sysctl", "-qw", "net.ipv4.tcp_retries2=7")
    a_end = ["eth-a", "netns", "host-a"]
    b_end = ["eth-b", "netns", "host-b"]
    ip("link", "add", *a_end, "type", "veth", "peer", "name", *b_end)
    for host, address in HOSTS.items():
        ip("-n", f"host-{host}", "address", "add", f"{address}/24", "dev", f"eth-{host}")
        set_link(host, "up")


def set_link(host: str, state: str):
    """Plug the cable of a host in ("up") or out ("down")."""
    ip("-n", f"host-{host}", "link", "set", f"eth-{host}", state)


def remove_hosts():
    """Kill everything that runs on the hosts, and remove them with their cable."""
    for host in HOSTS:
        for pid in pids(host):
            os.kill(pid, signal.SIGKILL)
        # An error says that there is no such host.
        subprocess.run(["ip", "netns", "delete", f"host-{host}"], stderr=subprocess.DEVNULL)


def pids(host: str) -> list[int]:
    words = ["ip", "netns", "pids", f"host-{host}"]
    result = subprocess.run(words, capture_output=True, text=True)
    return list(map(int, result.stdout.split()))


# ---------------------------------------------------------------------------------------------
# Runs


class Job:
    """A run of train_gpt2.py on both hosts; starts at once."""

    def __init__(self, folder: Path, data: Path, nnodes: str = "2", max_restarts: int = 5):
        self.folder = folder
        self.data = data
        self.nnodes = nnodes
        self.max_restarts = max_restarts
        folder.mkdir()
        self.launchers = {host: self.launch(host) for host in HOSTS}

    def launch(self, host: str) -> subprocess.Popen:
        """Start torchrun on a host; its output is appended to HOST.txt."""
        is_host = int(host == "a")
        conf = f"join_timeout=60,last_call_timeout=5,read_timeout=5,is_host={is_host}"
        words = ["ip", "netns", "exec", f"host-{host}"]
        words += [sys.executable, "-m", "torch.distributed.run", f"--nnodes={self.nnodes}"]
        words += ["--nproc_per_node=1", f"--max-restarts={self.max_restarts}"]
        words += ["--rdzv_backend=c10d", f"--rdzv_endpoint={HOSTS['a']}:{PORT}"]
        words += ["--rdzv_id=two_hosts", f"--rdzv_conf={conf}", f"--local_addr={HOSTS[host]}"]
        words += [str(ROOT / "train_gpt2.py"), "--data_dir", str(self.data)]
        words += ["--log_dir", str(self.folder / "log"), *RUN, "--resume"]
        with open(self.folder / f"{host}.txt", "a") as output:
            return subprocess.Popen(
                words,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"GLOO_SOCKET_IFNAME": f"eth-{host}"},
            )

    def worker(self, host: str) -> int:
        """The process that trains on a host."""
        for pid in pids(host):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            trains = any(word.endswith(b"train_gpt2.py") for word in words)
            if trains and b"torch.distributed.run" not in words:
                return pid
        raise RuntimeError(f"nothing trains on host {host}")

    def wait_for_step(self, step: int, seconds: float = 240):
        deadline = time.monotonic() + seconds
        while last_step(self.folder / "log") < step:
            late = f"step {step} was not reached in {seconds} s\n{self.outputs()}"
            assert time.monotonic() < deadline, late
            time.sleep(0.05)

    def wait(self, seconds: float, hosts: Sequence[str] = tuple(HOSTS)) -> dict[str, int]:
        """Wait for the launchers to end; returns their exit codes."""
        deadline = time.monotonic() + seconds
        codes = {}
        for host in hosts:
            try:
                codes[host] = self.launchers[host].wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                message = f"host {host} still runs after {seconds} s: it hangs\n{self.outputs()}"
                raise AssertionError(message) from None
        return codes

    def output(self, host: str) -> str:
        return (self.folder / f"{host}.txt").read_text()

    def outputs(self) -> str:
        """The end of what both launchers have printed."""
        return "\n".join(f"--- {host}\n{self.output(host)[-3000:]}" for host in HOSTS)


def read_log(folder: Path) -> list[tuple[int, str, float]]:
    """The (step, stream, value) lines of log.txt; the last one is ignored if it is incomplete."""
    path = folder / "log.txt"
    if not path.exists():
        return []
    lines = [line.split() for line in path.read_text().splitlines()]
    return [(int(line[0]), line[1], float(line[2])) for line in lines if len(line) == 3]


def last_step(folder: Path) -> int:
    return max((step for step, stream, _ in read_log(folder) if stream == "train"), default=-1)


def largest_difference(folder: Path, expected_folder: Path) -> float:
    """Of the values in two logs, which must have the same steps and streams."""
    actual = read_log(folder)
    expected = read_log(expected_folder)
    same_steps = [line[:2] for line in actual] == [line[:2] for line in expected]
    assert same_steps, "a step is missing or repeated"
    return max(abs(a[2] - b[2]) for a, b in zip(actual, expected))


# ---------------------------------------------------------------------------------------------
# Scenarios


def undisturbed(job: Job):
    assert_finishes(job)


def worker_killed(job: Job):
    for step, host in ((40, "b"), (80, "a")):
        job.wait_for_step(step)
        os.kill(job.worker(host), signal.SIGKILL)
    assert_finishes(job)


def launcher_killed(job: Job):
    """The launcher of host b dies, and something like an init system starts it again."""
    job.wait_for_step(60)
    job.launchers["b"].kill()
    job.launchers["b"].wait()
    time.sleep(3)
    job.launchers["b"] = job.launch("b")
    assert_finishes(job)


def cut_for_20_seconds(job: Job):
    job.wait_for_step(60)
    set_link("b", "down")
    time.sleep(20)
    set_link("b", "up")
    assert_finishes(job)


def elastic(job: Job):
    """Host b is gone for good; host a continues alone, with the same global batch."""
    job.wait_for_step(60)
    job.launchers["b"].kill()
    os.kill(job.worker("b"), signal.SIGKILL)
    assert_finishes(job, hosts=["a"])


def restarts_used_up(job: Job):
    """A worker dies and no restart is left."""
    job.wait_for_step(40)
    os.kill(job.worker("b"), signal.SIGKILL)
    assert_both_fail(job)


def cut_for_good(job: Job):
    job.wait_for_step(40)
    set_link("b", "down")
    assert_both_fail(job)


# The scenarios with the arguments of their Job.
SCENARIOS: dict[Callable[[Job], None], dict] = {
    undisturbed: {},
    worker_killed: {},
    launcher_killed: {},
    cut_for_20_seconds: {},
    elastic: dict(nnodes="1:2"),
    restarts_used_up: dict(max_restarts=0),
    cut_for_good: dict(max_restarts=0),
}


def assert_finishes(job: Job, hosts: Sequence[str] = tuple(HOSTS)):
    """The run succeeds, with the losses of a single process."""
    codes = job.wait(300, hosts)
    assert not any(codes.values()), f"{codes}\n{job.outputs()}"
    difference = largest_difference(job.folder / "log", job.folder.parent / "one_process")
    print(f"    largest difference from one process: {difference:.1e}")
    assert difference < 1e-4


def assert_both_fail(job: Job):
    """Both launchers end, and host a says why."""
    began = time.monotonic()
    codes = job.wait(60)
    seconds = time.monotonic() - began
    assert all(codes.values()), codes
    print(f"    both ended after {seconds:.0f} s:")
    errors = {}
    for host in HOSTS:
        lines = job.output(host).splitlines()
        errors[host] = [line for line in lines if "error:" in line.lower()]
        print(f"    {host}: {errors[host]}")
    assert "lost the connection" in "".join(errors["a"])


def main():
    scenarios = {scenario.__name__: scenario for scenario in SCENARIOS}
    work = Path(tempfile.mkdtemp(prefix="two_hosts_"))
    data = make_data(work)
    ok(command("train_gpt2.py", "--data_dir", data, "--log_dir", work / "one_process", *RUN))
    failed = []
    for name in sys.argv[1:] or scenarios:
        scenario = scenarios[name]
        print(name, flush=True)
        remove_hosts()
        connect_hosts()
        began = time.monotonic()
        try:
            scenario(Job(work / name, data, **SCENARIOS[scenario]))
        except AssertionError as error:
            failed.append(name)
            print(f"    FAILED: {error}")
        print(f"    {time.monotonic() - began:.0f} s", flush=True)
        remove_hosts()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; see {work}")
    shutil.rmtree(work)
    print("all well")


def make_data(work: Path) -> Path:
    """Small shards of Python's own source code."""
    text = work / "text.txt"
    text.write_text("\n".join(TEXTS))
    flags = "--source text --train_tokenizer 384 --num_workers 1".split()
    ok(command("fineweb.py", *flags, "--data_files", text, "--out_dir", work / "data"))
    return work / "data"


if __name__ == "__main__":
    main()
