"""What the process itself does meanwhile: it forks, it ends, it is interrupted."""

import subprocess
import sys
import textwrap

import pytest

import sluice

SETUP = """
import os, signal, sys, threading, time
import numpy as np
import sluice

geometry = sluice.ModelGeometry.preset("tiny")
x, idx, weights = sluice.make_workload(geometry, 8)
routing = sluice.Routing(idx, weights)

def exchange(transport, backend, timeout_ms):
    return sluice.Exchange(transport, backend, num_experts=geometry.num_experts, num_topk=geometry.num_topk,
                           hidden=geometry.hidden, max_tokens_per_rank=8, timeout_ms=timeout_ms)

def interrupt_in(seconds, what=signal.SIGINT):
    threading.Timer(seconds, os.kill, (os.getpid(), what)).start()

def in_child(body):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            body()
        except BaseException as error:
            print("child:", type(error).__name__, error, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
"""


def run(script, timeout=60):
    """What the script printed; it must end in order."""
    result = subprocess.run(
        [sys.executable, "-c", SETUP + textwrap.dedent(script)], capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, f"{result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def test_a_child_is_refused_by_name_and_ends():
    out = run("""
        backend = sluice.Backend(num_threads=3)
        sluice.quantize(backend, x)
        threads, alone = sluice.Transport.inproc(2), sluice.Transport.inproc(1)[0]
        home = os.getpid()

        def use():
            for call in (lambda: sluice.quantize(backend, x), lambda: threads[0].all_gather(b"")):
                try:
                    call()
                except sluice.Error as error:
                    assert error.code == "invalid_argument", error
                    assert f"made in process {home}, used in process {os.getpid()}" in str(error), error
                else:
                    raise AssertionError("not refused")
            own = sluice.Backend(num_threads=2)
            assert np.array_equal(sluice.quantize(own, x)[0], codes)

        def let_go():
            global backend, threads
            del backend, threads

        codes = sluice.quantize(sluice.Backend(num_threads=1), x)[0]
        print(in_child(use), in_child(let_go))
        assert np.array_equal(sluice.quantize(backend, x)[0], codes)  # The parent's work on.
    """)
    assert out.split() == ["0", "0"], out


def test_a_child_is_refused_on_a_gpu_too(gpu):
    out = run("""
        backend = sluice.Backend("cuda")
        backend.synchronize()
        home = os.getpid()

        def use():
            try:
                backend.synchronize()
            except sluice.Error as error:
                assert error.code == "invalid_argument" and f"backend: made in process {home}" in str(error), error
            else:
                raise AssertionError("not refused")

        def let_go():
            global backend
            del backend

        print(in_child(use), in_child(let_go))
        backend.synchronize()
    """)
    assert out.split() == ["0", "0"], out


def test_a_daemon_thread_waits_while_the_interpreter_ends():
    out = run("""
        class Slow:
            def __del__(self, sleep=time.sleep):
                sleep(1.5)  # The thread's wait ends meanwhile, and it wants the interpreter's lock.

        sys.modules["kept until the end"] = Slow()
        transports = sluice.Transport.inproc(2)
        thread = threading.Thread(target=transports[0].all_gather, args=(b"",), kwargs={"timeout_ms": 700}, daemon=True)
        thread.start()
        time.sleep(0.1)
        print("the end", flush=True)
    """)
    assert out == "the end\n"


def test_an_interrupt_ends_a_wait_and_loses_no_error():
    out = run("""
        transports = sluice.Transport.inproc(2)
        interrupt_in(0.3)
        begin = time.monotonic()
        try:
            transports[0].all_gather(b"", timeout_ms=30_000)
        except KeyboardInterrupt as interrupt:
            took, error = time.monotonic() - begin, interrupt.__context__
        assert isinstance(error, sluice.Error) and error.code == "interrupted", error
        assert "waited for other ranks" in str(error) and error.ranks == (), error
        print(took < 10)
    """)
    assert out == "True\n"


def test_an_interrupted_exchange_refuses_later_calls():
    out = run("""
        transports = sluice.Transport.inproc(2)
        backends = [sluice.Backend(num_threads=1) for _ in range(2)]
        made = [None] * 2
        thread = threading.Thread(target=lambda: made.__setitem__(1, exchange(transports[1], backends[1], 30_000)))
        thread.start()
        made[0] = exchange(transports[0], backends[0], 30_000)
        thread.join()
        interrupt_in(0.3)
        try:
            sluice.dispatch(made[0], x, routing)
        except KeyboardInterrupt as interrupt:
            print(interrupt.__context__)
        try:
            sluice.dispatch(made[0], x, routing)
        except sluice.Error as error:
            print(error.code, error)
    """).splitlines()
    assert len(out) == 2 and "rank 0: interrupted while it waited for other ranks" in out[0], out
    assert out[1].startswith("transport this exchange failed earlier") and "interrupted" in out[1], out


def test_what_a_handler_says_counts():
    out = run("""
        class Stop(Exception):
            pass

        def stop(*_):
            raise Stop("asked to")

        transports = sluice.Transport.inproc(2)
        seen = []
        signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))  # Raises nothing: the wait goes on.
        interrupt_in(0.2, signal.SIGUSR1)
        try:
            transports[0].all_gather(b"", timeout_ms=1_000)
        except sluice.Error as error:
            print(error.code, seen, error.__context__)
        signal.signal(signal.SIGUSR1, stop)
        interrupt_in(0.2, signal.SIGUSR1)
        try:
            transports[0].all_gather(b"", timeout_ms=30_000)
        except Stop as raised:
            print(raised, raised.__context__.code)
    """)
    assert out.splitlines() == ["peer_timeout [1] None", "asked to interrupted"], out


def test_an_interrupt_at_the_end_of_a_wait_keeps_its_error():
    out = run("""
        def blocked(*_):
            raise KeyboardInterrupt

        signal.signal(signal.SIGINT, blocked)
        transports = sluice.Transport.inproc(2)
        for _ in range(5):
            interrupt_in(0.01)
            try:
                transports[0].all_gather(b"", timeout_ms=40)  # Over before it is asked.
                raise AssertionError("nobody came")
            except KeyboardInterrupt as interrupt:
                error = interrupt.__context__
                assert isinstance(error, sluice.Error) and error.code in ("peer_timeout", "interrupted"), error
                print(error.ranks in ((1,), ()))
    """)
    assert out.split() == ["True"] * 5, out


def test_ranks_that_wait_in_other_threads_do_not_hold_up_the_program():
    out = run("""
        transports = sluice.Transport.inproc(3)
        codes = []

        def wait(rank):
            try:
                transports[rank].all_gather(b"", timeout_ms=1_500)
            except sluice.Error as error:
                codes.append(error.code)

        threads = [threading.Thread(target=wait, args=(r,)) for r in (0, 1)]
        for thread in threads:
            thread.start()
        interrupt_in(0.3)
        try:
            while True:
                time.sleep(0.05)
        except KeyboardInterrupt:
            print("interrupted", codes)
        for thread in threads:
            thread.join()
        print(codes)
    """)
    assert out.splitlines() == ["interrupted []", "['peer_timeout', 'peer_timeout']"], out


@pytest.mark.parametrize("path", ["/nonexistent/\udcff", "/nonexistent/\u00fc"])
def test_a_path_of_any_bytes_is_named(path):
    with pytest.raises(sluice.Error) as caught:
        sluice.Checkpoint(path)
    assert caught.value.code == "io" and path in str(caught.value)
