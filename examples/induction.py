"""Induction heads: what followed this token when it came before? Learnt on short rows, asked of long ones.

    python examples/induction.py
    python examples/induction.py --time-invariant

Rows of up to 256 tokens are learnt from, the short ones of them first to be understood; it is then asked of rows of
256, 512 and 1024 tokens. The last three lines say how many answers are right: 100.00 % each with selection, and
100.00 %, 72.07 % and 34.96 % without, after 75 seconds of one core.
"""

from __future__ import annotations

from synthetic import InductionHeads, accuracy, fit, parser


def main() -> None:
    options = parser((__doc__ or "").partition("\n")[0], length=256, steps=600, batch=32, lr=6e-3)
    args = options.parse_args()

    lengths = [args.length // 16, args.length // 4, args.length]  # they take turns
    tasks = [InductionHeads(max(3, length), args.values) for length in lengths]
    engine = fit(args, tasks, tasks[-1])
    for times in (1, 2, 4):
        found = accuracy(engine, InductionHeads(args.length * times, args.values), seed=args.seed + 2)
        print(f"{args.length * times} tokens: {found:.2%} right; by chance {1 / args.values:.2%}")


if __name__ == "__main__":
    main()
