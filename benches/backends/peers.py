"""The processes of `benches/compare` and `benches/change`: a backend starter, and the clients attached to it.

Each wait has a deadline, and whatever was started is stopped when its `with` block is left.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
PROMPT = "testpmd> "


class PeerError(Exception):
    """A sample that could not be taken; the text is for the operator."""


class Missing(PeerError):
    """This peer cannot run on this machine at all."""


def free_hugepages_mb():
    try:
        with open("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", encoding="ascii") as f:
            return int(f.read()) * 2
    except OSError:
        return 0


def pollux_binary():
    return os.environ.get("POLLUX") or os.path.join(HERE, "..", "..", "target", "release", "pollux")


def client_missing(client):
    """Why this client cannot run here, or None."""
    if client == "pollux":
        if not os.access(pollux_binary(), os.X_OK):
            return "client pollux: it is not built (cargo build --release)"
        return None
    if not shutil.which("dpdk-testpmd"):
        return "client testpmd: dpdk-testpmd is not installed (Debian package dpdk-dev)"
    if free_hugepages_mb() < 512:
        return (f"client testpmd: needs 512 MB in free 2 MB hugepages, has {free_hugepages_mb()} "
                "(as root: echo 768 >/proc/sys/vm/nr_hugepages)")
    return None


class Output:
    """What a process prints, collected by a thread so that waits can have deadlines."""

    def __init__(self, stream):
        self.text = ""
        self.ended = False
        self.changed = threading.Condition()
        threading.Thread(target=self._read, args=(stream,), daemon=True).start()

    def _read(self, stream):
        while True:
            data = os.read(stream.fileno(), 65536)
            with self.changed:
                self.text += data.decode("utf-8", "replace")
                self.ended = not data
                self.changed.notify_all()
            if not data:
                return

    def wait(self, wanted, start, seconds):
        """The text from `start` to the end of the first `wanted`, or None."""
        deadline = time.monotonic() + seconds
        with self.changed:
            while True:
                at = self.text.find(wanted, start)
                if at >= 0:
                    return self.text[start:at + len(wanted)]
                left = deadline - time.monotonic()
                if self.ended or left <= 0:
                    return None
                self.changed.wait(left)


def last_words(text, lines=3):
    return " / ".join(line.strip() for line in text.strip().splitlines()[-lines:])


class Process:
    """A child in a session of its own: a signal from the terminal reaches only us, and we stop it."""

    def __init__(self, command, env=None):
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                      stderr=subprocess.PIPE, env=env, start_new_session=True)
        self.out = Output(self.child.stdout)
        self.err = Output(self.child.stderr)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self, seconds=15):
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)
        try:
            self.child.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.child.pid, signal.SIGKILL)
            self.child.wait()


class Backend(Process):
    """A starter of this directory, ready for a client."""

    def __init__(self, name, cpu, helper_cpu, ports=2):
        starter = os.path.join(HERE, name)
        if not os.access(starter, os.X_OK):
            raise Missing(f"there is no starter benches/backends/{name}")
        self.name = name
        # Short: a unix socket's path takes 107 bytes.
        self.dir = tempfile.mkdtemp(prefix="plx-", dir="/tmp")
        super().__init__([starter, "--dir", self.dir, "--ports", str(ports), "--cpu", str(cpu),
                          "--helper-cpu", str(helper_cpu)])
        ready = self.out.wait("ready\n", 0, 60)
        if ready is None:
            self.stop()
            reason = last_words(self.err.text) or "not ready after 60 s, and said nothing"
            raise Missing(reason) if self.child.returncode == 3 else PeerError(f"{name}: {reason}")
        self.sockets = re.findall(r"^socket (.*)$", ready, re.M)
        self.version = " ".join(re.findall(r"^version (.*)$", ready, re.M))

    def check(self):
        """Raises if the backend died: what was measured meanwhile is worth nothing."""
        if self.child.poll() is not None or self.err.text:
            raise PeerError(f"{self.name} died during the run: {last_words(self.err.text)}")

    def stop(self, seconds=15):
        super().stop(seconds)
        shutil.rmtree(self.dir, ignore_errors=True)


class VirtioUser(Process):
    """DPDK's testpmd with two virtio-user ports: an independent driver that needs no VM."""

    def __init__(self, sockets, cpu, helper_cpu, ring, mergeable, ring_size):
        command = ["stdbuf", "-oL", "dpdk-testpmd", "--lcores", f"0@{helper_cpu},1@{cpu}",
                   "--main-lcore", "0", "--no-pci", "--iova-mode", "va", "--in-memory",
                   "--single-file-segments", "-m", "512", "--file-prefix", f"fe{os.getpid()}"]
        for n, path in enumerate(sockets):
            command += ["--vdev", f"net_virtio_user{n},path={path},queues=1,queue_size={ring_size},"
                        f"mac=52:54:00:00:00:0{n + 1},mrg_rxbuf={int(mergeable == 'on')},"
                        f"packed_vq={int(ring == 'packed')},in_order=0"]
        # Frames that wait in a receive ring at a start belong to the loop: they must not be flushed.
        command += ["--", "-i", "--nb-cores=1", "--forward-mode=mac", "--no-flush-rx",
                    "--eth-peer=0,52:54:00:00:00:02", "--eth-peer=1,52:54:00:00:00:01",
                    "--total-num-mbufs=32768", f"--txd={ring_size}", f"--rxd={ring_size}"]
        super().__init__(command)
        self.seen = 0
        self._prompt(30, "start")

    def _prompt(self, seconds, what):
        answer = self.out.wait(PROMPT, self.seen, seconds)
        if answer is None:
            words = last_words(self.err.text) or last_words(self.out.text)
            self.stop(0)
            raise PeerError(f"client testpmd did not get past '{what}': {words}")
        self.seen += len(answer)
        return answer

    def command(self, text):
        try:
            self.child.stdin.write(text.encode() + b"\n")
            self.child.stdin.flush()
        except OSError as error:
            raise PeerError(f"client testpmd ended: {last_words(self.err.text)}") from error
        return self._prompt(20, text)

    def stats(self):
        """(time, [counters of port 0, counters of port 1])"""
        text = self.command("show port stats all")
        now = time.monotonic()
        ports = [{key: int(value) for key, value in re.findall(r"([RT]X-\w+): +(\d+)", part)}
                 for part in text.split("NIC statistics for port")[1:]]
        if len(ports) != 2:
            raise PeerError("client testpmd printed no statistics")
        return now, ports

    def drain(self, command):
        """What each port receives, with nothing sent on."""
        self.command("set fwd rxonly")
        self.command("clear port stats all")
        self.command(command)
        time.sleep(0.3)
        self.command("stop")
        return [port["RX-packets"] for port in self.stats()[1]]

    def warm_up(self):
        """A backend may take a while after the negotiation until a port forwards (OVS does)."""
        for _ in range(15):
            if self.drain("start tx_first 1") == [32, 32]:
                return
        raise PeerError("no frame passed within 5 s")

    def closed_loop(self, size, window, seconds, backend):
        if size > 2000:
            raise PeerError(f"client testpmd: its buffers take no {size} B, use --client pollux")
        self.warm_up()
        self.command("set fwd mac")
        self.command(f"set txpkts {size}")
        self.command(f"start tx_first {window // 32}")
        time.sleep(0.5)
        start, before = self.stats()
        time.sleep(seconds)
        end, after = self.stats()
        self.command("stop")
        backend.check()
        frames = sum(b["RX-packets"] - a["RX-packets"] for a, b in zip(before, after))
        if frames == 0:
            raise PeerError("no frame passed")
        # Not one frame is in testpmd's hands now: what the loop held arrives in the receive rings.
        lost = 2 * window - sum(self.drain("start"))
        return dict(mpps=frames / (end - start) / 1e6, lost=lost)

    def stop(self, seconds=10):
        # `quit` over SIGTERM: it detaches from the backend in order.
        try:
            self.child.stdin.write(b"stop\nquit\n")
            self.child.stdin.close()
            self.child.wait(seconds)
        except (OSError, ValueError, subprocess.TimeoutExpired):
            pass
        super().stop(5)


def pollux_bench(backend, cpu, size, ring, mergeable, mode, seconds):
    """`pollux bench` attached to the backend's two sockets."""
    command = ["taskset", "-c", str(cpu), pollux_binary(), "bench",
               "--attach", ",".join(backend.sockets), "--size", str(size),
               "--seconds", f"{seconds:g}", "--ring", ring, "--mergeable", mergeable,
               "--mode", mode, "--json"]
    try:
        run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True,
                             timeout=seconds + 30, check=False)
    except subprocess.TimeoutExpired as error:
        raise PeerError(f"pollux bench was not done {seconds + 30:g} s after its start") from error
    backend.check()
    if run.returncode != 0:
        raise PeerError(f"pollux bench: {last_words(run.stderr.decode('utf-8', 'replace'))}")
    try:
        return bench_result(json.loads(run.stdout), mode)
    except (ValueError, KeyError, TypeError) as error:
        raise PeerError(f"pollux bench printed no usable result ({error!r})") from error


def bench_result(report, mode):
    if mode == "rtt":
        trip = report["round_trip"]
        micros = {key: trip[f"{key}_seconds"] * 1e6 for key in ("p50", "p99", "p999")}
        return dict(p50_us=micros["p50"], p99_us=micros["p99"], p999_us=micros["p999"],
                    lost=report.get("lost", 0))
    return dict(mpps=report["mpps"], lost=report["lost"])
