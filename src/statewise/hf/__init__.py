"""The Hugging Face world: models as directories of safetensors and JSON, and as models of transformers.

A directory of `save_pretrained` has three readers: `from_pretrained`, which needs nothing; `hf.on_hub.HubModel`, which
needs huggingface_hub; and, after `register()`, AutoModelForCausalLM of transformers. Each reads what the others write.
"""

from .auto import register, wrap
from .directory import from_pretrained, save_pretrained
from .run import export_run
from .tokenizer import save_tokenizer

__all__ = ["export_run", "from_pretrained", "register", "save_pretrained", "save_tokenizer", "wrap"]
