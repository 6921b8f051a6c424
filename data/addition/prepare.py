"""Sums of numbers of up to two digits, one per line (12+34=46): 9,000 train and 1,000 val lines, no download.

--digits=3 draws 100,000 of the million pairs of numbers of up to three digits. --reverse writes the answer's
last digit first (12+34=64), the order in which addition is done by hand. 12+34 and 34+12 are two lines.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from distrogpt.data.preparation.problems import check_range, line_parser, write_problems
from distrogpt.errors import CLOSE_OTHERS, cli_errors


@cli_errors(CLOSE_OTHERS)
def main() -> None:
    parser = line_parser(sys.argv[0], __doc__.splitlines()[0])
    add = parser.add_argument
    add("--digits", type=int, default=2, metavar="N", help="most digits of a number (default: 2)")
    add("--reverse", action="store_true", help="write the answer with its last digit first")
    args = parser.parse_args()
    check_range(1, 9, digits=args.digits)
    end = 10**args.digits

    def lines_of(number: int) -> list[str]:
        a, b = divmod(number, end)
        return [f"{a}+{b}={str(a + b)[:: -1 if args.reverse else 1]}"]

    write_problems(args, end * end, lines_of)


if __name__ == "__main__":
    main()
