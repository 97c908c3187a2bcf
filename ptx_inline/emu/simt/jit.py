"""The decorators of the compiled core's functions.

Numba optimises each function together with all that it calls, makes machine code of it and two wrappers, and compiles it
anew for every constant that it is called with. Without that the core compiles in a third of the time: it is optimised and
becomes machine code once, as a whole. A function without wrappers cannot be called from Python: doing so raises.
"""

from __future__ import annotations

from collections.abc import Callable

from numba import njit, types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import LoweringPass, register_pass

from ptx_inline.compiling import quick_compilation


class _Part(JITCodeLibrary):
    """LLVM IR that goes into its callers', where it is optimised and becomes machine code."""

    def _optimize_final_module(self):
        pass

    def _finalize_final_module(self):
        self._finalized = True


@register_pass(mutates_CFG=False, analysis_only=False)
class _MakeCallable(LoweringPass):
    """Callers find a function by the entry of its machine code; without one, by an object of its own."""

    _name = "make_part_callable"

    def __init__(self):
        LoweringPass.__init__(self)

    def run_pass(self, state):
        state.cr = state.cr._replace(entry_point=object())
        state.targetctx.insert_user_function(state.cr.entry_point, state.cr.fndesc, [state.library])
        return False


class _PartCompiler(CompilerBase):
    """Numba's passes for a function up to LLVM IR."""

    def define_pipelines(self):
        self.state.flags.no_compile = True
        self.state.library = _Part(self.state.targetctx.codegen(), self.state.func_id.func_qualname)
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
        passes.add_pass(_MakeCallable, "callable without machine code")
        passes.finalize()
        return [passes]


def compiled(function: Callable, *, forceinline: bool = False) -> Callable:
    """A function of the compiled core, to be called from compiled code only."""
    dispatcher = njit(
        nogil=True,
        error_model="numpy",
        no_cpython_wrapper=True,
        no_cfunc_wrapper=True,
        forceinline=forceinline,
        pipeline_class=_PartCompiler,
    )(function)
    template = dispatcher.get_call_template

    def get_call_template(args, kws):
        return template(tuple(types.unliteral(arg) for arg in args), kws)

    def refuse(*args, **kws):
        raise TypeError(f"{function.__name__} can be called from compiled code only; call it from an njit function")

    dispatcher.get_call_template = get_call_template
    # what Python calls: a compiled version would be inserted for it here, and asked for there
    dispatcher._insert = lambda *args, **kws: None
    dispatcher._compile_for_args = refuse
    return dispatcher


def quickly(dispatcher: Callable) -> Callable:
    """The same njit function; that it is compiled takes half the time."""
    compile_for = dispatcher.compile

    def compile_quickly(signature):
        with quick_compilation():
            return compile_for(signature)

    dispatcher.compile = compile_quickly
    return dispatcher


def inlined(function: Callable) -> Callable:
    """The same, put into its callers."""
    return compiled(function, forceinline=True)
