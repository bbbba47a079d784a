"""Pretrain the tiny Llama of `recipes/tiny/model` from nothing on one CPU core, and write its instruction sets.

OMP_NUM_THREADS=1 python recipes/tiny/pretrain.py --output recipes/tiny
"""

import argparse
import math
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import pretraining_text
import tasks
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, processors
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD, UNK = range(4)

SEED = 0
DOCUMENTS = 300_000
BATCH_DOCUMENTS = 36
STEPS = DOCUMENTS // BATCH_DOCUMENTS
LEARNING_RATE = 3e-3
WARMUP_STEPS = 50
WEIGHT_DECAY = 0.01
TESTED_PER_SKILL = 100

CONFIG = LlamaConfig(
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=512,
    initializer_range=0.08,  # about 1 / sqrt(hidden_size); the usual 0.02 learns half as fast at this width
    tie_word_embeddings=False,
    bos_token_id=BOS,
    eos_token_id=EOS,
    pad_token_id=PAD,
)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character and newline, one per byte for everything else; starts a text with bos."""
    special = ["<s>", "</s>", "<pad>", "<unk>"]
    pieces = special + [f"<0x{byte:02X}>" for byte in range(256)] + ["\n"] + [chr(c) for c in range(32, 127)]
    tokenizer = Tokenizer(
        models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def encode(tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """bos and the prompt; the answer and eos."""
    return tokenizer(prompt)["input_ids"], [*tokenizer(answer, add_special_tokens=False)["input_ids"], EOS]


def batches(questions: Iterable[tuple[list[int], list[int]]], window: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    """Padded ids and labels (BATCH_DOCUMENTS, length); -100 marks what carries no loss: prompts and padding.

    Within a window of batches, documents of similar length go together, which leaves little padding.
    """
    rng = random.Random(SEED)
    stream = iter(questions)
    while chunk := list(islice(stream, window * BATCH_DOCUMENTS)):
        chunk.sort(key=lambda question: len(question[0]) + len(question[1]))
        starts = list(range(0, len(chunk), BATCH_DOCUMENTS))
        rng.shuffle(starts)
        for start in starts:
            batch = chunk[start : start + BATCH_DOCUMENTS]
            ids = [torch.tensor(prompt + answer) for prompt, answer in batch]
            labels = [torch.tensor([-100] * len(prompt) + answer) for prompt, answer in batch]
            yield (
                pad_sequence(ids, batch_first=True, padding_value=PAD),
                pad_sequence(labels, batch_first=True, padding_value=-100),
            )


def learning_rate(step: int) -> float:
    """Linear warm-up, then a cosine to zero at STEPS."""
    return LEARNING_RATE * min((step + 1) / WARMUP_STEPS, 0.5 + 0.5 * math.cos(math.pi * step / STEPS))


def train(model: LlamaForCausalLM, questions: Iterable[tuple[list[int], list[int]]]) -> None:
    """One pass of AdamW over the questions, on the loss of the answers."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    started, recent = time.monotonic(), 0.0
    for step, (ids, labels) in enumerate(batches(questions)):
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        counted = labels[:, 1:] != -100
        hidden = model.model(ids[:, :-1]).last_hidden_state[counted]  # the head is a tenth of the work: answers only
        loss = F.cross_entropy(model.lm_head(hidden), labels[:, 1:][counted])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent += loss.item() / 200
        if step % 200 == 199:
            print(f"step {step + 1:5d}  loss {recent:.4f}  {time.monotonic() - started:6.1f} s", flush=True)
            recent = 0.0


@torch.no_grad()
def skill_accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Share of right answers per skill on words no pretraining text contains, every notation in turn.

    Greedy decoding gives the answer exactly when, fed the answer, each next token is the likeliest: one forward pass.
    """
    rng = random.Random(SEED + 1)
    notations = pretraining_text.TERSE_NOTATIONS + pretraining_text.SPOKEN_NOTATIONS
    scores = {}
    for name in tasks.SKILLS:
        right = 0
        for i in range(TESTED_PER_SKILL):
            question = pretraining_text.question(rng, name, notations[i % len(notations)], "test")
            prompt, answer = encode(tokenizer, *question)
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            right += logits.argmax(-1).tolist() == answer
        scores[name] = right / TESTED_PER_SKILL
    return scores


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder that gets model/ and instructions/")
    output: Path = parser.parse_args(argv).output

    torch.set_num_threads(1)  # the same sums in the same order wherever it runs
    torch.manual_seed(SEED)
    tokenizer = character_tokenizer()
    CONFIG.vocab_size = len(tokenizer)
    model = LlamaForCausalLM(CONFIG)
    print(f"{model.num_parameters():,} parameters")
    train(model, (encode(tokenizer, *question) for question in pretraining_text.pretraining_questions(SEED, DOCUMENTS)))
    for name, share in skill_accuracy(model.eval(), tokenizer).items():
        print(f"{name:12s} {share:6.1%} right on new words in the notations it was trained on")

    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    tasks.write_instruction_sets(output / "instructions")


if __name__ == "__main__":
    main()
