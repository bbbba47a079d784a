"""Records, chat templates and a tokenizer of bytes for the tests of this folder."""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from launcher.config import DataConfig
from launcher.data import encode as encoding
from launcher.data import templates

ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi?"},
    {"role": "assistant", "content": "Ho."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "No."},
]
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHATML_WITH_BLOCKS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(chat_template=None, **special):
    """A tokenizer with one token a byte: any text can be told from its ids."""
    marks = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(marks + letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        extra_special_tokens=marks[2:],
        **{"bos_token": "<s>", "eos_token": "</s>", **special},
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def encode(rows, tokenizer=None, **config):
    return encoding.encode(rows, tokenizer or byte_tokenizer(), DataConfig(**{"prompt_template": "short", **config}))


def shown(encoded, tokenizer, sample=0):
    """(whole text, text that carries loss) of a sample."""
    span = slice(*encoded.offsets[sample : sample + 2].tolist())
    ids = encoded.ids[span]
    return tokenizer.decode(ids), tokenizer.decode(ids[encoded.loss[span]])


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


# --- reading ---


def jsonl(*rows):
    return "\n".join(json.dumps(row) for row in rows)


# --- templates ---


def prompt(setting, tokenizer=None, **fields):
    tokenizer = tokenizer or byte_tokenizer()
    template = templates.load_template(setting, tokenizer, conversations=False)
    return templates.render_prompt({**ALPACA, **fields}, template, tokenizer)
