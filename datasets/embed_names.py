#!/usr/bin/env python
"""Embeds class names with a sentence model and writes the file that MODEL.TEXT.EMBEDDINGS names.

    pip install --target /tmp/sentence sentence-transformers      # not needed by HierVL itself
    PYTHONPATH=/tmp/sentence python datasets/embed_names.py --model FOLDER --table shapes --out FILE.npz

The names come from a table of hiervl/data/tables (--table) or from a text file (--names) with one name per line,
or `name<TAB>text` where the words to embed are not the class's own name ("sign symbol<TAB>traffic sign").
"""

import argparse
import sys
from pathlib import Path

import numpy as np

TABLES = Path(__file__).resolve().parents[1] / "hiervl" / "data" / "tables"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a sentence model (or its name on the hub)")
    parser.add_argument("--model-name", help="what to call it in the file (default: the folder's name)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--table", help="data set whose class names are embedded, such as shapes")
    source.add_argument("--names", help="text file: a line per name, or name<TAB>text")
    parser.add_argument("--template", default="a photo of a {}", help="the sentence; {} is the text (%(default)s)")
    parser.add_argument("--out", required=True, help="file to write (.npz)")
    args = parser.parse_args()
    if "{}" not in args.template:
        parser.error("--template has no {} for the name")
    names, texts = read_table(args.table) if args.table else read_names(args.names)
    np.savez(
        args.out,
        names=np.array(names),
        texts=np.array(texts),
        embeddings=embed(args.model, [args.template.format(text) for text in texts]),
        model=np.array(args.model_name or Path(args.model).name),
        template=np.array(args.template),
    )
    print(f"{args.out}: {len(names)} names")


def embed(model: str, sentences: list[str]) -> np.ndarray:
    """Unit vectors, float16 (sentences, width)."""
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(model, device="cpu")
    lengths = encoder.tokenizer(sentences, truncation=False)["input_ids"]
    for sentence, tokens in zip(sentences, lengths):
        if len(tokens) > encoder.max_seq_length:
            sys.exit(f"error: '{sentence}' has {len(tokens)} tokens, the model reads {encoder.max_seq_length}")
    vectors = encoder.encode(sentences, normalize_embeddings=True, convert_to_numpy=True)
    return vectors.astype(np.float16)


def read_table(name: str) -> tuple[list[str], list[str]]:
    """(names, texts) of a data set's table; the texts are the names."""
    import yaml

    path = TABLES / f"{name}.yaml"
    if not path.exists():
        sys.exit(f"error: there is no {path}; known are {', '.join(sorted(p.stem for p in TABLES.glob('*.yaml')))}")
    names = [c["name"] for c in yaml.safe_load(path.read_text(encoding="utf-8"))["classes"]]
    return names, names


def read_names(path: str) -> tuple[list[str], list[str]]:
    """(names, texts) of a text file; a name without a text is its own text."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        sys.exit(f"error: cannot read {path} ({error.strerror})")
    rows = [line.partition("\t") for line in lines if line.strip()]
    return [name.strip() for name, _, _ in rows], [(text or name).strip() for name, _, text in rows]


if __name__ == "__main__":
    main()
