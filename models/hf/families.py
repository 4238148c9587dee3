"""The supported model families. A new one is a file in this folder and an entry here (docs/hugging_face.md)."""

from models.hf.deepseek_v2 import DEEPSEEK_V2
from models.hf.deepseek_v3 import DEEPSEEK_V3
from models.hf.ernie4_5_moe import ERNIE4_5_MOE
from models.hf.family import Family
from models.hf.glm4_moe import GLM4_MOE
from models.hf.gpt_oss import GPT_OSS
from models.hf.granitemoe import GRANITEMOE
from models.hf.llama import LLAMA
from models.hf.llama4 import LLAMA4
from models.hf.minimax_m2 import MINIMAX_M2
from models.hf.mixtral import MIXTRAL
from models.hf.olmoe import OLMOE
from models.hf.phimoe import PHIMOE
from models.hf.qwen2 import QWEN2, QWEN2_MOE
from models.hf.qwen3 import QWEN3, QWEN3_MOE

_SPARSE = (
    *(MIXTRAL, QWEN3_MOE, OLMOE, QWEN2_MOE, DEEPSEEK_V3, DEEPSEEK_V2),
    *(GLM4_MOE, GPT_OSS, ERNIE4_5_MOE, MINIMAX_M2, GRANITEMOE, LLAMA4, PHIMOE),
)
FAMILIES: dict[str, Family] = {family.name: family for family in (*_SPARSE, LLAMA, QWEN3, QWEN2)}

_HINTS = {
    "llama4": ". Its text is llama4_text, as AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) writes it"
}
"""model_type -> what to do instead."""


def family_named(name: object, where: str) -> Family:
    """The family of that name. Raises ValueError if there is none; `where`: where the name comes from, for the
    message."""
    found = next((family for family in FAMILIES.values() if name in (family.name, *family.aliases)), None)
    if found is None:
        hint = _HINTS.get(str(name), "")
        raise ValueError(f"{where} is {name!r}, which is not a supported family: {', '.join(FAMILIES)}{hint}")
    return found
