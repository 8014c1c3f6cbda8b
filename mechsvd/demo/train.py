"""Train the embedded model from scratch: `python -m mechsvd.demo.train [DIRECTORY [STEP …]]`.

Training is seeded and takes about 15 minutes on 2 cores. It makes text, a byte-level BPE tokenizer
and a model of the Llama architecture. The result is a plain Hugging Face directory in half
precision. The numbers of its model card are measured on held-out text, after the rounding to half
precision.

With steps, such as `DIRECTORY 100 1000`, the model after each of them goes to a folder of its own,
DIRECTORY/step-100, in single precision. `load_model` takes these training checkpoints.
"""

import math
import random
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mechsvd.demo import WEIGHTS
from mechsvd.demo.dictionary import DICTIONARY
from mechsvd.demo.language import SHAPES, translation_prompt, write

SEED = 0
VOCABULARY = 1024
CONTEXT = 256
STEPS, ROWS = 2500, 16  # 10 million tokens
PEAK_RATE = 3e-3
SHAPE_WEIGHTS = (2, 2, 2, 3)  # word lists have the most to learn
BOS, EOS = "<s>", "</s>"


def main(directory: Path = WEIGHTS, checkpoints: Collection[int] = ()) -> None:
    """Train, round to half precision, measure, and store model, tokenizer and card.

    Args:
        checkpoints: steps after which the model is stored too; see `train`.
    """
    torch.manual_seed(SEED)
    started = time.perf_counter()
    tokenizer = train_tokenizer(random.Random(f"{SEED} tokenizer"))
    model = LlamaForCausalLM(configuration())
    rng = random.Random(f"{SEED} train")
    train(model, tokenizer, rng, checkpoints=checkpoints, directory=directory)
    model.half().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    card = model_card(model.float(), tokenizer, minutes=(time.perf_counter() - started) / 60)
    (directory / "README.md").write_text(card, encoding="utf-8")
    print(card)


def train_tokenizer(rng: random.Random, texts: int = 8000) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that puts BOS before every text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((sample_text(rng)[0] for _ in range(texts)), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=BOS, eos_token=EOS, model_max_length=CONTEXT
    )


def configuration() -> LlamaConfig:
    """Six layers of a small Llama: grouped heads, RMSNorm, rotary positions, tied embeddings."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rng: random.Random,
    *,
    steps: int = STEPS,
    rows: int = ROWS,
    checkpoints: Collection[int] = (),
    directory: Path = WEIGHTS,
) -> None:
    """Train with AdamW, warm-up and a cosine schedule, on rows packed from whole texts.

    Args:
        steps: updates of the weights; the schedule spans them.
        rows: texts per step, each as long as the context.
        checkpoints: steps after which model and tokenizer are stored in `directory`/step-N; 0 is
            the model before training.

    Raises:
        ValueError: a checkpoint is not from 0 to `steps`.
    """
    if outside := sorted({*checkpoints} - {*range(steps + 1)}):
        raise ValueError(f"`checkpoints` holds {outside}, but training has steps 0 to {steps}.")
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_RATE, total_steps=steps, pct_start=0.08
    )

    def store(step: int) -> None:
        if step in checkpoints:
            model.save_pretrained(directory / f"step-{step}")
            tokenizer.save_pretrained(directory / f"step-{step}")

    model.train()
    store(0)
    bar = tqdm(range(1, steps + 1), desc="training", mininterval=5)
    for step in bar:
        batch = torch.stack([packed_row(tokenizer, rng) for _ in range(rows)])
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        store(step)
    model.eval()


def sample_text(rng: random.Random) -> tuple[str, float]:
    """Write one text of a random shape; returns it with the nats of its choices."""
    return write(rng.choices(SHAPES, SHAPE_WEIGHTS)[0], rng)


def packed_row(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Tensor:
    """Concatenate texts, each with BOS and EOS, and cut at the context length."""
    ids: list[int] = []
    while len(ids) < CONTEXT:
        ids += [*tokenizer(sample_text(rng)[0]).input_ids, tokenizer.eos_token_id]
    return torch.tensor(ids[:CONTEXT])


@dataclass(frozen=True)
class HeldOut:
    """Mean surprise of new texts in nats per token.

    Attributes:
        model: surprise of the model.
        language: surprise of a reader who knows the language exactly.
        tokens: how many tokens were scored.
    """

    model: float
    language: float
    tokens: int


@torch.no_grad()
def held_out_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: int = 400
) -> HeldOut:
    """Measure the loss on texts from a seed that training never used, one text per row."""
    rng = random.Random(f"{SEED} held out")
    nats = floor = tokens = 0.0
    for _ in range(texts):
        shape = rng.choices(SHAPES, SHAPE_WEIGHTS)[0]
        text, information = write(shape, rng)
        ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
        nats += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        floor += information - math.log(SHAPE_WEIGHTS[SHAPES.index(shape)] / sum(SHAPE_WEIGHTS))
        tokens += ids.shape[1] - 1
    return HeldOut(model=nats / tokens, language=floor / tokens, tokens=int(tokens))


@torch.no_grad()
def translation_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: int = 3
) -> float:
    """Measure the share of the dictionary that greedy text translates correctly.

    The examples in the prompt come from a seed that training never used.
    """
    rng = random.Random(f"{SEED} few-shot")
    pieces = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    ends = [i for i, piece in enumerate(pieces) if "\n" in piece]  # the answer is one line
    right = 0
    for english, french in DICTIONARY.items():
        shots = rng.sample(sorted(set(DICTIONARY.items()) - {(english, french)}), examples)
        ids = torch.tensor([tokenizer(translation_prompt(english, shots)).input_ids])
        answer = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=16,
            do_sample=False,
            eos_token_id=[tokenizer.eos_token_id, *ends],
            pad_token_id=tokenizer.eos_token_id,
        )
        text = tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)
        right += text.partition("\n")[0] == f" {french}"
    return right / len(DICTIONARY)


def model_card(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, minutes: float) -> str:
    """Describe how the model was made and what it measured, after rounding to half precision."""
    loss, accuracy = held_out_loss(model, tokenizer), translation_accuracy(model, tokenizer)
    c = model.config
    heads, groups = c.num_attention_heads, c.num_key_value_heads
    return f"""# The embedded model of mechsvd

A language model of {model.num_parameters():,} parameters: Llama architecture,
{c.num_hidden_layers} layers, d_model {c.hidden_size}, {heads} heads on {groups} key-value heads,
context {CONTEXT}, tied embeddings, a vocabulary of {len(tokenizer)} (byte-level BPE), stored in
half precision. MIT licence, like the project.

**Made by** `python -m mechsvd.demo.train`: seed {SEED}, {STEPS} steps of {ROWS} × {CONTEXT}
tokens, {minutes:.0f} minutes on {torch.get_num_threads()} CPU threads. The text comes from
`mechsvd/demo/language.py`: reflective sentences, popular science, short mails, and few-shot
English-to-French word lists over a dictionary of {len(DICTIONARY)} entries.

**Measured** on texts from a seed that training never used:

- held-out loss {loss.model:.3f} nats per token over {loss.tokens:,} tokens; the choices of the
  language itself have {loss.language:.3f};
- the right French word for {accuracy:.1%} of the dictionary, in greedy text after three unseen
  examples.

It knows only this language. It is for trying mechsvd offline and for tests, not for claims about
language models.
"""


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else WEIGHTS
    main(target, [int(step) for step in sys.argv[2:]])
