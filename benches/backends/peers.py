"""The processes of `benches/compare`, `benches/change` and `qemu/bench`: a backend starter, and the clients attached to it.

Each wait has a deadline, and whatever was started is stopped when its `with` block is left.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
HERE = os.path.dirname(os.path.abspath(__file__))
PROMPT = "testpmd> "


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the arguments: the usage before it would be ten, and --help has it."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


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


def machine():
    """What results are worth nothing without."""
    model = "unknown CPU"
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as lines:
        found = re.search(r"^model name\s*: (.*)$", lines.read(), re.M)
    if found:
        model = found.group(1)
    return dict(cpu=model, cpus=os.cpu_count(), kernel=os.uname().release, load_before=os.getloadavg()[0])


def machine_line(at):
    return f"{at['cpu']}, {at['cpus']} CPUs, Linux {at['kernel']}, load before {at['load_before']:.2f}"


def scenarios_binary():
    """The measuring program: what SCENARIOS names, or this tree's, built if it is not."""
    named = os.environ.get("SCENARIOS")
    if named:
        if not os.access(named, os.X_OK):
            raise Missing(f"there is no program {named} to measure with")
        return named
    command = ["cargo", "build", "--release", "--locked", "--bins", "--bench", "scenarios",
               "--message-format", "json"]
    try:
        run = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except FileNotFoundError as error:
        raise Missing("cargo is not installed, and builds what measures here") from error
    if run.returncode != 0:
        raise PeerError(f"{' '.join(command[:6])}: {last_words(run.stderr.decode())}")
    for line in run.stdout.decode().splitlines():
        artifact = json.loads(line)
        if artifact.get("executable") and artifact["target"]["name"] == "scenarios":
            return artifact["executable"]
    raise PeerError("cargo built no program 'scenarios'")


def scenario(binary, arguments, seconds, cpus, rounds=1, feed=None):
    """One scenario of the measuring program, as an object."""
    command = [binary, *arguments, "--seconds", f"{seconds:g}", "--rounds", str(rounds),
               "--cpus", ",".join(map(str, cpus))]
    try:
        run = subprocess.run(command, input=feed, stdin=None if feed else subprocess.DEVNULL,
                             capture_output=True, timeout=600 + 60 * seconds, check=False)
    except subprocess.TimeoutExpired as error:
        raise PeerError(f"{arguments[0]}: the measurement did not end") from error
    if run.returncode != 0:
        raise PeerError(f"{arguments[0]}: {last_words(run.stderr.decode())}")
    return json.loads(run.stdout)


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
        place = os.environ.get("TMPDIR", "/tmp")
        try:
            self.dir = tempfile.mkdtemp(prefix="plx-", dir=place)
        except OSError as error:
            raise Missing(f"no directory for its sockets can be made in {place}: {error.strerror} (set TMPDIR)") from error
        super().__init__([starter, "--dir", self.dir, "--ports", str(ports), "--cpu", str(cpu),
                          "--helper-cpu", str(helper_cpu)])
        ready = self.out.wait("ready\n", 0, 60)
        if ready is None:
            self.stop()
            reason = last_words(self.err.text) or "not ready after 60 s, and said nothing"
            raise Missing(reason) if self.child.returncode == 3 else PeerError(f"{name}: {reason}")
        self.sockets = re.findall(r"^socket (.*)$", ready, re.M)
        self.version = " ".join(re.findall(r"^version (.*)$", ready, re.M))

    def look(self):
        """What its polling core has done so far, or None where it does not say: a moment, time with frames and all time
        (of one unit; without the latter, seconds), and frames."""
        if self.name in ("pollux", "before"):
            command = [pollux_binary(), "poll", "list", "--json", "--api-socket", f"{self.dir}/api.sock"]
        elif self.name == "ovs":
            command = ["ovs-appctl", "-t", f"{self.dir}/vswitchd.ctl", "dpif-netdev/pmd-stats-show"]
        else:
            return None
        try:
            run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=True)
            now, text = time.monotonic(), run.stdout.decode()
            if self.name in ("pollux", "before"):
                thread = json.loads(text)[0]
                return now, thread["busy_seconds"], None, thread["frames"]
            polling = text[text.index("pmd thread"):]
            count = lambda name: int(re.search(rf"{name}: +(\d+)", polling).group(1))  # noqa: E731
            busy = count("processing cycles")
            return now, busy, busy + count("idle cycles"), count("packets received")
        except (OSError, subprocess.SubprocessError, ValueError, KeyError, IndexError, AttributeError) as error:
            self.check()
            raise PeerError(f"{self.name} does not say what its polling core did ({error!r})") from error

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
        looks, watches = [backend.look()], [Watch(backend.child.pid), Watch(self.child.pid)]
        start, before = self.stats()
        time.sleep(seconds)
        end, after = self.stats()
        share = min(watch.share() for watch in watches)
        looks.append(backend.look())
        self.command("stop")
        backend.check()
        frames = sum(b["RX-packets"] - a["RX-packets"] for a, b in zip(before, after))
        if frames == 0:
            raise PeerError("no frame passed")
        # Not one frame is in testpmd's hands now: what the loop held arrives in the receive rings.
        lost = 2 * window - sum(self.drain("start"))
        result = dict(mpps=frames / (end - start) / 1e6, lost=lost, share=share)
        busy = busy_ns(*looks)
        if busy is not None:
            result.update(busy_ns=busy, busy=result["mpps"] * busy / 1e3)
        return result

    def stop(self, seconds=10):
        # `quit` over SIGTERM: it detaches from the backend in order.
        try:
            self.child.stdin.write(b"stop\nquit\n")
            self.child.stdin.close()
            self.child.wait(seconds)
        except (OSError, ValueError, subprocess.TimeoutExpired):
            pass
        super().stop(5)


def processor_seconds(session):
    """What all processes of a session have used; a starter is the first of its backend's."""
    ticks = 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
                fields = stat.read().rpartition(")")[2].split()
        except OSError:
            continue  # It has just ended.
        if int(fields[3]) == session:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


class Watch:
    """How much of a core the processes of a session have from here on."""

    def __init__(self, session):
        self.session, self.start, self.used = session, time.monotonic(), processor_seconds(session)

    def share(self):
        return (processor_seconds(self.session) - self.used) / (time.monotonic() - self.start)


def busy_ns(before, after):
    """Nanoseconds of the polling core a frame, between two looks."""
    if before is None or after is None or after[3] == before[3]:
        return None
    busy = after[1] - before[1]
    if after[2] is not None:
        busy *= (after[0] - before[0]) / (after[2] - before[2])
    return busy / (after[3] - before[3]) * 1e9


def pollux_bench(backend, cpu, size, ring, mergeable, mode, seconds):
    """`pollux bench` attached to the backend's two sockets, with rings of a kind and a size."""
    command = ["taskset", "-c", str(cpu), pollux_binary(), "bench",
               "--attach", ",".join(backend.sockets), "--size", str(size),
               "--seconds", f"{seconds:g}", "--ring", ring[0], "--ring-size", str(ring[1]), "--mergeable", mergeable,
               "--mode", mode, "--json"]
    before, watch = backend.look(), Watch(backend.child.pid)
    try:
        run = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True,
                             timeout=seconds + 30, check=False)
    except subprocess.TimeoutExpired as error:
        raise PeerError(f"pollux bench was not done {seconds + 30:g} s after its start") from error
    share = watch.share()
    backend.check()
    said = last_words(run.stderr.decode("utf-8", "replace"))
    try:
        report = json.loads(run.stdout)
    except ValueError as error:
        raise PeerError(f"pollux bench: {said or f'exit code {run.returncode}'}") from error
    if report.get("ended_early"):
        # If it was the backend's end, its starter has something to say about it, soon.
        backend.err.wait("\n", 0, 2)
        backend.check()
    try:
        result = bench_result(report, mode, busy_ns(before, backend.look()))
        # Both poll without a pause: less than a core each means that other programs ran there.
        result["share"] = min(share, report["client_cpu_seconds"] / report["seconds"])
        return result
    except (KeyError, TypeError) as error:
        raise PeerError(f"pollux bench printed no usable result ({error!r})") from error


def bench_result(report, mode, busy):
    """The figures of a run that is one: loss is a figure, everything else that went wrong is not."""
    if report["ended_early"]:
        raise PeerError(f"the run was cut short: {report['ended_early']}")
    spoiled = {key: report[key] for key in ("corrupt", "duplicated", "out_of_order") if report[key]}
    if spoiled:
        raise PeerError("frames were wrong: " + ", ".join(f"{n} {what}" for what, n in spoiled.items()))
    if report["verdict"] == "inconclusive":
        raise PeerError("the client itself stood still, so the run says nothing")
    if mode == "rtt":
        trip = report["round_trip"]
        micros = {key: trip[f"{key}_seconds"] * 1e6 for key in ("p50", "p99", "p999")}
        return dict(p50_us=micros["p50"], p99_us=micros["p99"], p999_us=micros["p999"],
                    lost=report["lost"] + trip["lost"])
    if report["received"] == 0:
        raise PeerError("no frame passed")
    result = dict(mpps=report["mpps"], lost=report["lost"], client_busy=report["client_busy_share"])
    if busy is not None:
        result.update(busy_ns=busy, busy=report["mpps"] * busy / 1e3, mpps_at_full_use=1e3 / busy)
    return result
