"""The stubs under which an engine's own code runs, over a small engine made here."""

import subprocess
import sys
import textwrap

import engine_stubs
import pytest


@pytest.fixture()
def engine(tmp_path, monkeypatch):
    package = tmp_path / "engine" / "engine"
    (package / "inner").mkdir(parents=True)
    (tmp_path / "engine" / "engine-1.2.3.post1.dist-info").mkdir()
    (package / "__init__.py").write_text("")
    (package / "heavy.py").write_text("raise RuntimeError('not wanted')")
    (package / "many").mkdir()
    (package / "many" / "__init__.py").write_text("raise RuntimeError('not wanted either')")
    (package / "many" / "one.py").write_text("ONE = 1")
    (package / "optional.py").write_text("try:\n    import absent_too\nexcept ImportError:\n    absent_too = None\n")
    (package / "inner" / "__init__.py").write_text(textwrap.dedent("""
        import json, absent, absent.ops.quant as quant
        from absent.kernels import Base, jit, tuned
        from engine import heavy, many, optional
        from engine.many.one import ONE

        class Derived(Base):
            def __init__(self, n: "quant.Type | None" = None):
                self.n = n

        @jit
        @tuned(configs=[quant.Config(1), quant.Config(2)])
        def add(a, b):
            return a + b
    """))
    monkeypatch.setenv("SLUICE_ENGINE_FILES", str(tmp_path))
    return tmp_path


def run(program):
    return subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True,
                          cwd=engine_stubs.ROOT / "tests" / "python")


def test_an_engine_imports_and_its_own_code_runs(engine):
    assert engine_stubs.path_of("engine") == engine / "engine"
    assert engine_stubs.version_of("engine") == "1.2.3.post1"
    assert engine_stubs.path_of("other") is None
    done = run("""
        import engine_stubs
        stubs = engine_stubs.use("engine", missing=["absent", "json"], replaced=["engine.heavy"],
                                  bare=["engine.many"])
        from engine import inner, optional
        stubs.seal()
        assert inner.ONE == 1 and inner.many.Two
        assert inner.add(2, 3) == 5 and inner.Derived(7).n == 7 and isinstance(inner.Derived(7), inner.Base)
        assert optional.absent_too is None and inner.json.loads("[1]") == [1]
        assert not isinstance(3, inner.quant.Type) and inner.heavy.anything.at.all
        assert sorted(stubs.used) == ["absent", "absent.kernels", "absent.ops", "absent.ops.quant", "engine.heavy",
                                      "engine.many"]
        try:
            inner.quant.compress(1)
        except engine_stubs.StubCalled as error:
            assert "absent.ops.quant.compress() was called" in str(error)
        else:
            raise AssertionError("a stub was called")
        try:
            [*inner.quant.shapes]
        except TypeError as error:
            assert "not iterable" in str(error), error
        else:
            raise AssertionError("a stub was iterated over")
        import math
        assert engine_stubs.seam("engine.inner.Derived.__init__") and engine_stubs.seam("math.pi") == math.pi
        for name, what in (("engine.inner.Derived.apply", "engine.inner.Derived has no apply"),
                           ("engine.gone.Class", "engine has no gone"), ("none.at.all", "no module none"),
                           ("absent.ops.quant", "is a stub"), ("engine.heavy.Thing", "is a stub")):
            try:
                engine_stubs.seam(name)
            except engine_stubs.SeamMoved as error:
                assert str(error).startswith(name) and what in str(error), error
            else:
                raise AssertionError(name)
    """)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("missing, replaced, what", [
    ([], ["engine.heavy"], "No module named 'absent'"),
    (["absent"], [], "not wanted"),
])
def test_nothing_is_stubbed_unless_it_is_named(engine, missing, replaced, what):
    done = run(f"""
        import engine_stubs
        engine_stubs.use("engine", missing={missing}, replaced={replaced})
        import engine.inner
    """)
    assert done.returncode != 0 and what in done.stderr
