"""Small parts of the engine, measured alone.

python -m benchmarks.micro                       # everything, in every build: half an hour
python -m benchmarks.micro steps                 # where a step's time goes
python -m benchmarks.micro products --cpu avx2   # matrix products in each mode, beside torch's
python -m benchmarks.micro decoding              # decoding beside the time of its products
"""

from __future__ import annotations

import argparse

from benchmarks import decoding, products, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", metavar="PART")
    parts.add_parser("steps", help="attention, planning, and what is around the model in a step")
    kinds = {}
    for name, module in (("products", products), ("decoding", decoding)):
        kinds[name] = parts.add_parser(
            name,
            help=(module.__doc__ or "").splitlines()[0],
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(kinds[name])
    args = parser.parse_args()
    if args.part in (None, "steps"):
        steps.run()
    if args.part in (None, "products"):
        products.run(args if args.part else kinds["products"].parse_args([]))
    if args.part in (None, "decoding"):
        decoding.run(args if args.part else kinds["decoding"].parse_args([]))


if __name__ == "__main__":
    main()
