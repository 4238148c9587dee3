"""`python -m tests.stand_ins.signatures PACKAGE VERSION SOURCES`: reads the parameters of what the project calls of a
package out of its sources, a folder or an archive (.zip, .whl, .tar, .tar.gz), and records them in signatures.json.
transformer_engine_fp8 is what the FP8 recipes need of TransformerEngine, which older versions have as well.

Nothing is imported or built: modules are parsed. Of each name the table has the parameters in order: "name", "name="
where there is a default, "*" before those that are keywords only, "**name"; null where the version lacks it. Names of a
compiled extension have "native" instead. "NAME attributes" are those of ATTRIBUTES that the module of a class names.

The sources of the table, from clones of the projects on GitHub:

    git archive --prefix=te/ -o te.tar v2.9 transformer_engine && python -m tests.stand_ins.signatures \
        transformer_engine 2.9.0 te.tar
    git archive --prefix=te/ -o te.tar v2.3 transformer_engine && python -m tests.stand_ins.signatures \
        transformer_engine_fp8 2.3.0 te.tar
    git archive --prefix=apex/ -o apex.tar HEAD apex csrc && python -m tests.stand_ins.signatures apex 6424da3 apex.tar
"""

import ast
import inspect
import json
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("signatures.json")
NAMES = {
    "transformer_engine": [
        "transformer_engine.pytorch.Linear",
        "transformer_engine.pytorch.Linear.forward",
        "transformer_engine.pytorch.LayerNormLinear",
        "transformer_engine.pytorch.LayerNormLinear.forward",
        "transformer_engine.pytorch.GroupedLinear",
        "transformer_engine.pytorch.GroupedLinear.forward",
        "transformer_engine.pytorch.RMSNorm",
        "transformer_engine.pytorch.DotProductAttention",
        "transformer_engine.pytorch.DotProductAttention.forward",
        "transformer_engine.pytorch.DotProductAttention.set_context_parallel_group",
        "transformer_engine.pytorch.cpp_extensions.general_grouped_gemm",
        "transformer_engine.pytorch.module.base.get_multi_stream_cublas_workspace",
        "transformer_engine.pytorch.moe_permute",
        "transformer_engine.pytorch.moe_unpermute",
        "transformer_engine.pytorch.router.fused_topk_with_score_function",
        "transformer_engine.pytorch.optimizers.FusedAdam",
        "transformer_engine.pytorch.optimizers.FusedAdam.step",
    ],
    "transformer_engine_fp8": [
        "transformer_engine.common.recipe.DelayedScaling",
        "transformer_engine.common.recipe.Float8CurrentScaling",
        "transformer_engine.common.recipe.MXFP8BlockScaling",
        "transformer_engine.common.recipe.Float8BlockScaling",
        "transformer_engine.pytorch.autocast",
        "transformer_engine.pytorch.fp8_autocast",
        *(
            f"transformer_engine.pytorch.{module}.FP8GlobalStateManager.{method}"
            for module in ("quantization", "fp8")
            for method in ("reset", "is_fp8_available", "is_mxfp8_available", "is_fp8_block_scaling_available")
        ),
        *(
            f"transformer_engine.pytorch.{layer}{method}"
            for layer in ("Linear", "GroupedLinear")
            for method in ("", ".forward", ".init_fp8_metadata")
        ),
    ],
    "apex": [
        "apex.normalization.FusedRMSNorm",
        "apex.normalization.FusedRMSNorm.forward",
        "apex.normalization.fused_layer_norm.fused_rms_norm_affine",
        "apex.optimizers.FusedAdam",
        "apex.optimizers.FusedAdam.step",
        "fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32",
        "fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp16",
    ],
}
"""What the project calls, and what its stand-ins have."""
OF_WEIGHTS = ["weight", "bias", "main_grad", "grad_added_to_main_grad", "overwrite_main_grad", "zero_out_wgrad"]
OF_NORMS = ["layer_norm_weight", "layer_norm_bias", "return_layernorm_output"]
STEPS = ["exp_avg", "exp_avg_sq", "step", "lr", "betas", "eps", "weight_decay"]
ATTRIBUTES = {
    "transformer_engine": {
        "transformer_engine.pytorch.Linear": [*OF_WEIGHTS, "return_bias"],
        "transformer_engine.pytorch.LayerNormLinear": [*OF_WEIGHTS, "return_bias", *OF_NORMS],
        "transformer_engine.pytorch.RMSNorm": ["weight"],
        "transformer_engine.pytorch.DotProductAttention": ["softmax_offset"],
        "transformer_engine.pytorch.optimizers.FusedAdam": STEPS,
    },
    "transformer_engine_fp8": {
        "transformer_engine.common.recipe.Format": ["E4M3", "HYBRID"],
        "transformer_engine.pytorch.module.base.TransformerEngineBaseModule": [
            "fp8_meta",
            "scaling_fwd",
            "scaling_bwd",
        ],
        "transformer_engine.pytorch.fp8.DelayedScalingRecipeState": ["scale", "amax_history"],
    },
    "apex": {"apex.optimizers.FusedAdam": STEPS},
}
"""What the project reads or sets of a class, of its parameters, or of an optimizer's state and groups."""
EXTENSIONS = {"fused_weight_gradient_mlp_cuda": "csrc/megatron/fused_weight_gradient_dense.cpp"}
"""By the name of a compiled module: the source that binds its functions."""

Read = Callable[[str], str | None]
"""A path within the sources -> the text of that file, or None."""


def reader(sources: Path) -> Read:
    """Reads files of a folder or of an archive, whatever folder of the archive they are in."""
    if sources.is_dir():
        return lambda path: (sources / path).read_text() if (sources / path).is_file() else None
    if zipfile.is_zipfile(sources):
        archive = zipfile.ZipFile(sources)
        contents: dict[str, Callable[[], bytes]] = {n: (lambda n=n: archive.read(n)) for n in archive.namelist()}
    else:
        tar = tarfile.open(sources)  # noqa: SIM115 (as long as the process)
        files = [member for member in tar.getmembers() if member.isfile()]
        contents = {m.name: (lambda m=m: tar.extractfile(m).read()) for m in files}  # pyright: ignore

    def read(path: str) -> str | None:
        found = next((name for name in (path, *contents) if name in contents and f"/{name}".endswith(f"/{path}")), None)
        return None if found is None else contents[found]().decode()

    return read


def signatures(package: str, read: Read) -> dict[str, Any]:
    """The entry of a version in the table."""
    attributes = {
        f"{name} attributes": [wanted for wanted in names if wanted in _names_of_module(name, read)]
        for name, names in ATTRIBUTES[package].items()
    }
    return {**{name: _parameters(name, read) for name in NAMES[package]}, **attributes}


def _names_of_module(name: str, read: Read) -> set[str]:
    """The names, attributes and strings in the module where a class is defined."""
    module, _, attribute = name.rpartition(".")
    definition = _definition(module, attribute, read)
    found: set[str] = set()
    for node in ast.walk(definition.tree) if definition else ():
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


def _parameters(name: str, read: Read) -> Any:
    module, _, attribute = name.rpartition(".")
    if module in EXTENSIONS:
        return "native" if f'm.def("{attribute}"' in (read(EXTENSIONS[module]) or "") else None
    method = "__init__"
    if attribute[0].islower() and module.rpartition(".")[2][0].isupper():
        method, (module, _, attribute) = attribute, module.rpartition(".")
    definition = _definition(module, attribute, read)
    if definition is None:
        return None
    found = definition.node
    return _listed(found.args) if isinstance(found, ast.FunctionDef) else _of_method(definition, method, read)


def _of_method(definition: "Definition", method: str, read: Read) -> list[str] | None:
    """The parameters of a class's method, which a class above may define; without __init__: none, or the fields of a
    dataclass."""
    node: Any = definition.node
    inside = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == method]
    if inside:
        is_static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in inside[-1].decorator_list)
        return _listed(inside[-1].args)[0 if is_static else 1 :]
    if method == "__init__" and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign)]
        return [f"{ast.unparse(n.target)}{'' if n.value is None else '='}" for n in fields]
    above = (_definition(definition.module, base.id, read) for base in node.bases if isinstance(base, ast.Name))
    listed = (_of_method(base, method, read) for base in above if base and isinstance(base.node, ast.ClassDef))
    return next((entry for entry in listed if entry is not None), [] if method == "__init__" else None)


@dataclass(frozen=True)
class Definition:
    """Of a class or function: its text, and that of the module it is in."""

    node: ast.ClassDef | ast.FunctionDef
    module: str
    tree: ast.Module


def _definition(module: str, name: str, read: Read, depth: int = 0) -> Definition | None:
    """What a name of a module stands for, through what it imports."""
    path, is_package = module.replace(".", "/"), False
    text = read(f"{path}.py")
    if text is None:
        text, is_package = read(f"{path}/__init__.py"), True
    if text is None or depth > 8:
        return None
    stars: list[str] = []
    tree = ast.parse(text)
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return Definition(node, module, tree)
        if isinstance(node, ast.ImportFrom):
            above = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            source = ".".join([*above, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _definition(source, alias.name, read, depth + 1)
                stars += [source] if alias.name == "*" else []
    return next((found for star in stars if (found := _definition(star, name, read, depth + 1))), None)


def _listed(args: ast.arguments) -> list[str]:
    plain = [*args.posonlyargs, *args.args]
    first = len(plain) - len(args.defaults)
    listed = [f"{a.arg}{'=' if i >= first else ''}" for i, a in enumerate(plain)]
    listed += [f"*{args.vararg.arg}"] if args.vararg else ["*"] if args.kwonlyargs else []
    listed += [f"{a.arg}{'' if d is None else '='}" for a, d in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    return listed + ([f"**{args.kwarg.arg}"] if args.kwarg else [])


def as_signature(listed: list[str]) -> inspect.Signature:
    """An entry of the table as Python knows signatures."""
    kind, found = inspect.Parameter.POSITIONAL_OR_KEYWORD, []
    for entry in listed:
        name = entry.strip("*=")
        if entry.startswith("**"):
            found.append(inspect.Parameter(name, inspect.Parameter.VAR_KEYWORD))
        elif entry.startswith("*"):
            found += [inspect.Parameter(name, inspect.Parameter.VAR_POSITIONAL)] if name else []
            kind = inspect.Parameter.KEYWORD_ONLY
        else:
            default = None if entry.endswith("=") else inspect.Parameter.empty
            found.append(inspect.Parameter(name, kind, default=default))
    return inspect.Signature(found)


def table() -> dict[str, dict[str, dict[str, Any]]]:
    """By package and version: the parameters of each name."""
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def main(package: str, version: str, sources: str) -> None:
    known = table()
    known.setdefault(package, {})[version] = signatures(package, reader(Path(sources)))
    lines = []
    for name, versions in sorted(known.items()):
        of_versions = []
        for number, entries in sorted(versions.items()):
            rows = ",\n".join(f"   {json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items())
            of_versions.append(f'  "{number}": {{\n{rows}\n  }}')
        lines.append(f' "{name}": {{\n' + ",\n".join(of_versions) + "\n }")
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
