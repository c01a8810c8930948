#!/usr/bin/env python
"""Embeds class names with a CLIP text tower or a sentence model, and writes the file for MODEL.TEXT.EMBEDDINGS.

    python datasets/embed_names.py --tower ViT-B-16 --pretrained openai --table shapes --out FILE.npz

    pip install --target /tmp/sentence sentence-transformers      # not needed by HierVL itself
    PYTHONPATH=/tmp/sentence python datasets/embed_names.py --model FOLDER --table shapes --out FILE.npz

The names come from a table in hiervl/data/tables (--table) or from a text file (--names) with one name per line, or
`name<TAB>text` to embed another text than the class name ("sign symbol<TAB>traffic sign").
"""

import argparse
import os
import sys
import zipfile
from pathlib import Path

import numpy as np

from hiervl.errors import UserError
from hiervl.ownership import OutputFolder

ROOT = Path(__file__).resolve().parents[1]
TABLES = ROOT / "hiervl" / "data" / "tables"


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--tower", help="open_clip model, or local-dir:FOLDER, as in MODEL.TEXT.MODEL")
    model.add_argument("--model", help="folder of a sentence model, or its name on the Hugging Face Hub")
    parser.add_argument("--pretrained", default="openai", help="weights of the tower: tag or file (%(default)s)")
    parser.add_argument("--model-name", help="name of the model to record in the file (default: name of its folder)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--table", help="dataset whose class names to embed, such as shapes")
    source.add_argument("--names", help="text file with lines of the form name, or name<TAB>text")
    parser.add_argument(
        "--template",
        action="append",
        metavar="SENTENCE",
        help="sentence with {} for the text; repeat to average several ('a photo of a {}')",
    )
    parser.add_argument("--out", required=True, help="file to write (.npz)")
    args = parser.parse_args(argv)
    templates = args.template or ["a photo of a {}"]
    if any("{}" not in template for template in templates):
        parser.error("--template has no {} for the text; add one")
    out = args.out if args.out.endswith(".npz") else f"{args.out}.npz"  # np.savez would add the suffix too
    folder = claim(out, [args.names, args.pretrained])
    names, texts = read_table(args.table) if args.table else read_names(args.names)
    if args.tower:
        embeddings = embed_with_tower(args.tower, args.pretrained, templates, texts)
        model_name = args.model_name or f"{args.tower} {args.pretrained}"
    else:
        embeddings = l2_normalize(sum(embed(args.model, [t.format(text) for text in texts]) for t in templates))
        model_name = args.model_name or Path(args.model).name
    folder.add([out])
    np.savez(
        out,
        names=np.array(names),
        texts=np.array(texts),
        embeddings=embeddings.astype(np.float16),
        model=np.array(model_name),
        template=np.array(" | ".join(templates)),
    )
    print(f"{out}: {len(names)} names")


def claim(out: str, sources: list) -> OutputFolder:
    """The folder of the file to write; exits if that file is a source or was not written by this tool."""
    try:
        folder = OutputFolder(os.path.dirname(out) or ".", "--out", ours=is_ours(out))
        folder.check([out], filter(None, sources))
        return folder
    except UserError as error:
        sys.exit(f"error: {error}")


def is_ours(path: str) -> bool:
    """Whether a file has the content that this tool writes; earlier versions kept no record of their files."""
    try:
        with np.load(path) as content:
            return {"names", "texts", "embeddings", "model", "template"} <= set(content)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile):
        return False


def embed_with_tower(model: str, pretrained: str, templates: list[str], texts: list[str]) -> np.ndarray:
    """Unit vectors (texts, width) of a CLIP text tower, averaged over the templates."""
    from hiervl.modeling.text import TextTower

    try:
        return TextTower(model, pretrained, tuple(templates)).embed(texts, texts).numpy()
    except UserError as error:
        sys.exit(f"error: {error}")


def l2_normalize(vectors: np.ndarray) -> np.ndarray:
    """Scales the rows of (N, width) to unit length."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def embed(model: str, sentences: list[str]) -> np.ndarray:
    """Unit vectors (sentences, width) of a sentence model."""
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(model, device="cpu")
    lengths = encoder.tokenizer(sentences, truncation=False)["input_ids"]
    for sentence, tokens in zip(sentences, lengths):
        if len(tokens) > encoder.max_seq_length:
            sys.exit(
                f"error: '{sentence}' has {len(tokens)} tokens, but the model reads {encoder.max_seq_length}; "
                "shorten it"
            )
    return encoder.encode(sentences, normalize_embeddings=True, convert_to_numpy=True)


def read_table(name: str) -> tuple[list[str], list[str]]:
    """(names, texts) from a dataset's table; the texts are the names."""
    import yaml

    path = TABLES / f"{name}.yaml"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in TABLES.glob("*.yaml")))
        sys.exit(f"error: --table {name} is unknown; choose one of {known}")
    names = [c["name"] for c in yaml.safe_load(path.read_text(encoding="utf-8"))["classes"]]
    return names, names


def read_names(path: str) -> tuple[list[str], list[str]]:
    """(names, texts) from a text file; the text of a name defaults to the name itself."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        sys.exit(f"error: cannot read {path} ({error.strerror})")
    rows = [line.partition("\t") for line in lines if line.strip()]
    return [name.strip() for name, _, _ in rows], [(text or name).strip() for name, _, text in rows]


if __name__ == "__main__":
    main()
