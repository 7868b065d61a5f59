"""Fine-tune a chat model with QLoRA on conversations, with TRL: frozen weights in 4 bits, LoRA adapters on top.

    python examples/sft_qlora.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset trl-lib/Capybara

A dataset is a name on the Hub or a JSON-lines file of `{"messages": [{"role": "user", "content": "..."}, ...]}`.
"""

import argparse
import os

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="name on the Hub, or a folder")
    parser.add_argument("--dataset", default="trl-lib/Capybara", help="name on the Hub, or a .jsonl file")
    parser.add_argument("--output-dir", default="sft-qlora")
    parser.add_argument("--max-steps", type=int, default=-1, help="-1: a whole epoch")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--gradient-accumulation-steps", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--optim", default="adamw_8bit")
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--logging-steps", type=int, default=1)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="to compute in")
    parser.add_argument("--attn-implementation", default=None, choices=["eager", "sdpa", "flash_attention_2"])
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--cpu", action="store_true", help="train on the CPU even where there is a GPU")
    return parser.parse_args()


def main() -> None:
    args = parse_args()

    if os.path.isfile(args.dataset):
        dataset = load_dataset("json", data_files=args.dataset, split="train")
    else:
        dataset = load_dataset(args.dataset, split="train")

    model_init_kwargs = {"dtype": args.dtype, "attn_implementation": args.attn_implementation}
    if args.cpu:
        model_init_kwargs["device_map"] = {"": "cpu"}

    trainer = SFTTrainer(
        model=args.model,
        args=SFTConfig(
            output_dir=args.output_dir,
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            gradient_checkpointing=args.gradient_checkpointing,
            max_length=args.max_length,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=2,
            optim=args.optim,
            logging_steps=args.logging_steps,
            bf16=args.dtype == "bfloat16",
            use_cpu=args.cpu,
            disable_tqdm=not args.progress,
            seed=args.seed,
            save_strategy="no",
            report_to="none",
            model_init_kwargs=model_init_kwargs,
        ),
        train_dataset=dataset,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=args.dtype,
        ),
        peft_config=LoraConfig(
            r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    metrics = trainer.train().metrics
    if trainer.args.device.type == "cuda":
        metrics["peak_gpu_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30

    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    trainer.save_model()


if __name__ == "__main__":
    main()
