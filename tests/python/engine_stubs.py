"""An inference engine's own Python code, run where most of what it imports is not installed.

scripts/setup.sh puts the Python files of an engine's wheel into build/engines/NAME (SLUICE_ENGINE_FILES
names another folder), without what the wheel depends on. A test then runs a program of its own, as
importing an engine changes the whole process, that starts so:

    import engine_stubs

    stubs = engine_stubs.use("sglang", missing=["zmq", "sgl_kernel"], replaced=["sglang.srt.warmup"])
    from sglang.srt.layers.quantization.w4afp8 import W4AFp8Config   # the engine's own
    stubs.seal()

`missing` are modules that the engine imports and that nobody installed: each name stands for itself
and for all below it. An installed one is used as it is, so the same program runs on a machine that has
more. `replaced` are modules of the engine itself that are not wanted, `bare` packages of it whose __init__.py
is not, while the modules in them are the engine's own; list as few as will do. Whatever is in no list and
is not installed raises ModuleNotFoundError, as ever: nothing is stubbed unless it is named, and
`try: import ...` of optional packages goes the engine's way.

A stub has every attribute, is a base class, and calling it gives another stub, or the function that it
decorates. So modules can be imported; nothing can be computed: after seal() a call of a stub raises
StubCalled with its name. `stubs.used` has the names that were imported, for a report.

    path = engine_stubs.path_of("vllm")     # of the folder, or None: skip the test, and say why
    seam("sglang.srt.layers.moe.topk.StandardTopKOutput")    # the object, or SeamMoved with its name
"""

import abc
import importlib
import importlib.abc
import importlib.machinery
import os
import sys
import types
from pathlib import Path

ROOT = Path(__file__).parents[2]


class StubCalled(RuntimeError):
    """Something was to be computed by a module that is not installed."""


class SeamMoved(AssertionError):
    """An engine has no longer what its plug-in is put on."""


class _StubType(abc.ABCMeta):
    """Stubs are classes, so that they serve as bases, in annotations and in isinstance()."""

    def __getattr__(cls, name):
        if name.startswith("__") or "_stub_of" not in cls.__dict__:  # A class that derives from a stub.
            raise AttributeError(name)
        made = _stub(cls._stub_of, f"{cls._stub_name}.{name}")
        setattr(cls, name, made)
        return made

    def __call__(cls, *args, **kwargs):
        if "_stub_of" not in cls.__dict__:
            return super().__call__(*args, **kwargs)
        if cls._stub_of.sealed:
            raise StubCalled(f"{cls._stub_name}() was called: it is not installed, and a stub computes nothing")
        if len(args) == 1 and not kwargs and isinstance(args[0], types.FunctionType | type):
            return args[0]  # A decorator; what it is given stays what it is.
        return _stub(cls._stub_of, f"{cls._stub_name}()")

    def __getitem__(cls, _):
        return cls

    __iter__ = None  # Otherwise __getitem__ would make a stub a sequence without an end.

    def __repr__(cls):
        return f"<stub of {cls._stub_name}>"


def _stub(stubs, name):
    return _StubType(name.rpartition(".")[2], (), {
        "_stub_of": stubs, "_stub_name": name, "__init_subclass__": classmethod(lambda cls, **_: None)})


class _StubModule(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        made = _stub(self.__loader__.stubs, f"{self.__name__}.{name}")
        setattr(self, name, made)
        return made


class _Loader(importlib.abc.Loader):
    def __init__(self, stubs):
        self.stubs = stubs

    def create_module(self, spec):
        self.stubs.used.append(spec.name)
        module = _StubModule(spec.name)
        module.__version__ = "0.0.0"
        return module

    def exec_module(self, module):
        pass


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, stubs, names, bare=()):
        self._loader, self._names, self._bare = _Loader(stubs), names, bare

    def find_spec(self, name, path=None, target=None):
        spec = importlib.machinery.ModuleSpec(name, self._loader, is_package=True)
        if name in self._bare:  # Its other modules are found where they are.
            spec.submodule_search_locations = importlib.machinery.PathFinder.find_spec(
                name, path).submodule_search_locations
            return spec
        return spec if any(name == n or name.startswith(n + ".") for n in self._names) else None


class Stubs:
    """What use() put in place."""

    def __init__(self, missing, replaced, bare):
        self.sealed = False
        self.used: list[str] = []
        sys.meta_path.insert(0, _Finder(self, tuple(replaced), tuple(bare)))
        sys.meta_path.append(_Finder(self, tuple(missing)))

    def seal(self):
        """From now on a call of a stub raises StubCalled. Importing more stubs still works."""
        self.sealed = True


def path_of(engine):
    """The folder with the engine's Python files, or None where it was not fetched."""
    path = Path(os.environ.get("SLUICE_ENGINE_FILES") or ROOT / "build" / "engines") / engine
    return path if (path / engine / "__init__.py").exists() else None


def version_of(engine):
    """As its dist-info has it."""
    (folder,) = path_of(engine).glob(f"{engine}-*.dist-info")
    return folder.name.removesuffix(".dist-info").partition("-")[2]


def use(engine, *, missing=(), replaced=(), bare=()):
    """Makes `import ENGINE` find the fetched files, with stubs for what is named. In a process of its own."""
    path = path_of(engine)
    if path is None:
        raise ModuleNotFoundError(f"no {engine} in build/engines: scripts/setup.sh fetches it")
    sys.dont_write_bytecode = False  # Compiling an engine takes longer than everything else.
    sys.path.insert(0, str(path))
    return Stubs(missing, replaced, bare)


def seam(name):
    """The object of a dotted name. Raises SeamMoved, naming the first part that is not there."""
    parts = name.split(".")
    module, rest = None, parts
    for end in range(len(parts), 0, -1):
        candidate = ".".join(parts[:end])
        try:
            module, rest = importlib.import_module(candidate), parts[end:]
            break
        except ModuleNotFoundError as error:
            if error.name != candidate and not candidate.startswith(f"{error.name}."):
                raise  # It is there, and something that it imports is not.
    if module is None:
        raise SeamMoved(f"{name}: there is no module {parts[0]}")
    found, there = module, module.__name__
    for part in rest:
        if not hasattr(found, part):
            raise SeamMoved(f"{name}: {there} has no {part}")
        found, there = getattr(found, part), f"{there}.{part}"
    if isinstance(found, _StubModule) or "_stub_of" in getattr(found, "__dict__", ()):
        raise SeamMoved(f"{name}: it is a stub, nothing of an engine")
    return found
