"""Two hosts on one machine: two network namespaces joined by a cable, torchrun in each, and what can go wrong.

    sudo python tests/by_hand/two_hosts.py                 # all scenarios, some 10 minutes
    sudo python tests/by_hand/two_hosts.py cut_for_good    # one of them

Needs root and `ip` (iproute2). Each scenario trains train_gpt2.py on two hosts with Gloo into a shared run folder and
compares log.txt with that of one process: every step once, losses within 1e-4.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from conftest import TEXTS  # noqa: E402

HOSTS = {"a": "10.77.0.1", "b": "10.77.0.2"}
STEPS, TIMEOUT = 200, 35
MODEL = "--n_layer 4 --n_head 4 --n_embd 64 --block_size 64 --B 2 --T 64 --total_batch_size 512 --device cpu".split()
RUN = [
    *MODEL,
    *f"--dtype float32 --max_steps {STEPS} --warmup_steps 10 --val_every 50 --val_tokens 2000".split(),
]
RUN += f"--sample_every 0 --hellaswag_every 0 --rolling_every 10 --timeout {TIMEOUT}".split()
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = (
    "1"  # or a launcher that was started anew could not join the others
)


def ip(*words):
    subprocess.run(["ip", *words], check=True)


def lay_cable():
    for host in HOSTS:
        ip("netns", "add", f"host-{host}")
        ip("-n", f"host-{host}", "link", "set", "lo", "up")
        # torchrun waits for a vanished host's store until TCP gives up: after 15 minutes, or with 7 retries after 51 s
        ip("netns", "exec", f"host-{host}", "sysctl", "-qw", "net.ipv4.tcp_retries2=7")
    ip(
        "link",
        "add",
        "eth-a",
        "netns",
        "host-a",
        "type",
        "veth",
        "peer",
        "name",
        "eth-b",
        "netns",
        "host-b",
    )
    for host, address in HOSTS.items():
        ip("-n", f"host-{host}", "address", "add", f"{address}/24", "dev", f"eth-{host}")
        plug(host, "up")


def plug(host: str, state: str):
    ip("-n", f"host-{host}", "link", "set", f"eth-{host}", state)


def remove_cable():
    for host in HOSTS:
        subprocess.run(["ip", "netns", "delete", f"host-{host}"], stderr=subprocess.DEVNULL)


def pids(host: str) -> list[int]:
    listed = subprocess.run(
        ["ip", "netns", "pids", f"host-{host}"], capture_output=True, text=True
    ).stdout
    return list(map(int, listed.split()))


class Job:
    """A run of train_gpt2.py on both hosts."""

    def __init__(self, folder: Path, data: Path, nnodes: str = "2", max_restarts: int = 5):
        self.folder, self.data, self.nnodes, self.max_restarts = folder, data, nnodes, max_restarts
        self.began = time.monotonic()
        folder.mkdir()
        self.launchers = {host: self.launch(host) for host in HOSTS}

    def launch(self, host: str) -> subprocess.Popen:
        words = [
            "ip",
            "netns",
            "exec",
            f"host-{host}",
            sys.executable,
            "-m",
            "torch.distributed.run",
        ]
        words += [
            f"--nnodes={self.nnodes}",
            "--nproc_per_node=1",
            f"--max-restarts={self.max_restarts}",
        ]
        words += [
            "--rdzv_backend=c10d",
            f"--rdzv_endpoint={HOSTS['a']}:29400",
            "--rdzv_id=two_hosts",
        ]
        words += [
            f"--local_addr={HOSTS[host]}",
            f"--rdzv_conf=join_timeout=60,last_call_timeout=5,read_timeout=5,is_host={int(host == 'a')}",
        ]
        words += [
            str(ROOT / "train_gpt2.py"),
            "--data_dir",
            str(self.data),
            "--log_dir",
            str(self.folder / "log"),
        ]
        with open(self.folder / f"{host}.txt", "a") as output:
            return subprocess.Popen(
                [*words, *RUN, "--resume"], stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | dict(GLOO_SOCKET_IFNAME=f"eth-{host}"),
            )  # fmt: skip

    def worker(self, host: str) -> int:
        """The process that trains on a host."""
        for pid in pids(host):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if (
                any(word.endswith(b"train_gpt2.py") for word in words)
                and b"torch.distributed.run" not in words
            ):
                return pid
        raise RuntimeError(f"nothing trains on host {host}")

    def wait_for_step(self, step: int, seconds: float = 240):
        deadline = time.monotonic() + seconds
        while last_step(self.folder / "log") < step:
            assert time.monotonic() < deadline, (
                f"step {step} was not reached in {seconds} s\n{self.outputs()}"
            )
            time.sleep(0.05)

    def wait(self, seconds: float, hosts=tuple(HOSTS)) -> dict[str, int]:
        """Exit codes of the launchers."""
        deadline = time.monotonic() + seconds
        try:
            return {
                host: self.launchers[host].wait(max(0.1, deadline - time.monotonic()))
                for host in hosts
            }
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"still running after {seconds} s: it hangs\n{self.outputs()}"
            ) from None

    def outputs(self) -> str:
        return "\n".join(
            f"--- {host}\n" + (self.folder / f"{host}.txt").read_text()[-3000:] for host in HOSTS
        )


def log(folder: Path) -> list[tuple[str, str, float]]:
    path = folder / "log.txt"
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return [
        (step, stream, float(value))
        for step, stream, value in (line for line in lines if len(line) == 3)
    ]


def last_step(folder: Path) -> int:
    return max((int(step) for step, stream, _ in log(folder) if stream == "train"), default=-1)


def compare(found: Path, expected: Path) -> float:
    ours, theirs = log(found), log(expected)
    assert [line[:2] for line in ours] == [line[:2] for line in theirs], (
        "a step is missing, or stands there twice"
    )
    return max(abs(a[2] - b[2]) for a, b in zip(ours, theirs))


def undisturbed(job: Job):
    finish(job)


def worker_killed(job: Job):
    for step, host in ((40, "b"), (80, "a")):
        job.wait_for_step(step)
        os.kill(job.worker(host), signal.SIGKILL)
    finish(job)


def launcher_killed(job: Job):
    """The launcher of host b dies and comes back, as an init system would start it again."""
    job.wait_for_step(60)
    job.launchers["b"].kill()
    job.launchers["b"].wait()
    time.sleep(3)
    job.launchers["b"] = job.launch("b")
    finish(job)


def cut_for_20_seconds(job: Job):
    job.wait_for_step(60)
    plug("b", "down")
    time.sleep(20)
    plug("b", "up")
    finish(job)


def elastic(job: Job):
    """Host b goes for good; host a goes on alone, with the same global batch."""
    job.wait_for_step(60)
    job.launchers["b"].kill()
    os.kill(job.worker("b"), signal.SIGKILL)
    finish(job, hosts=["a"])


def restarts_used_up(job: Job):
    """A worker dies and there is no restart left: both sides end, each with a clear line."""
    job.wait_for_step(40)
    os.kill(job.worker("b"), signal.SIGKILL)
    fail(job)


def cut_for_good(job: Job):
    job.wait_for_step(40)
    plug("b", "down")
    fail(job)


def finish(job: Job, hosts: list[str] = tuple(HOSTS)):
    """The run ends well, with the losses of one process."""
    codes = job.wait(300, hosts)
    assert not any(codes.values()), f"{codes}\n{job.outputs()}"
    difference = compare(job.folder / "log", job.folder.parent / "one")
    print(f"    largest difference to one process: {difference:.1e}")
    assert difference < 1e-4


def fail(job: Job):
    """Both sides end, and say why."""
    began = time.monotonic()
    codes = job.wait(60)
    seconds = time.monotonic() - began
    assert all(codes.values()), codes
    lines = {host: [line for line in (job.folder / f"{host}.txt").read_text().splitlines() if "error:" in line.lower()]
             for host in HOSTS}  # fmt: skip
    print(f"    both ended after {seconds:.0f} s: {lines}")
    assert "lost the connection" in "".join(lines["a"])


SCENARIOS = {  # what happens, and torchrun's settings
    undisturbed: {}, worker_killed: {}, launcher_killed: {}, cut_for_20_seconds: {}, elastic: dict(nnodes="1:2"),
    restarts_used_up: dict(max_restarts=0), cut_for_good: dict(max_restarts=0),
}  # fmt: skip


def main():
    scenarios = {scenario.__name__: scenario for scenario in SCENARIOS}
    work = Path(tempfile.mkdtemp(prefix="two_hosts_"))
    data = make_data(work)
    subprocess.run([sys.executable, ROOT / "train_gpt2.py", "--data_dir", data, "--log_dir", work / "one", *RUN],
                   check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    failed = []
    for name in sys.argv[1:] or scenarios:
        print(name, flush=True)
        remove_cable()
        lay_cable()
        began = time.monotonic()
        try:
            scenarios[name](Job(work / name, data, **SCENARIOS[scenarios[name]]))
        except AssertionError as error:
            failed.append(name)
            print(f"    FAILED: {error}")
        print(f"    {time.monotonic() - began:.0f} s", flush=True)
        kill_all()
        remove_cable()
    print("failed: " + ", ".join(failed) if failed else "all well")
    shutil.rmtree(work) if not failed else print(f"see {work}")
    sys.exit(bool(failed))


def kill_all():
    for host in HOSTS:
        for pid in pids(host):
            os.kill(pid, signal.SIGKILL)


def make_data(work: Path) -> Path:
    """Shards of this repository's own files."""
    (work / "text.txt").write_text("\n".join(TEXTS))
    words = [
        "--source",
        "text",
        "--data_files",
        work / "text.txt",
        "--train_tokenizer",
        "384",
        "--num_workers",
        "1",
    ]
    subprocess.run([sys.executable, ROOT / "fineweb.py", *words, "--out_dir", work / "data"], check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    return work / "data"


if __name__ == "__main__":
    main()
