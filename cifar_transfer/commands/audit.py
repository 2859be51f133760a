"""What is probably wrong with images.

    python -m cifar_transfer audit NAME[=WEIGHTS] [options of fit]

Lists are made from the features of a backbone, which are shared with `probe`. `labels.csv` has the
images whose label is probably wrong, by cross-validation; `duplicates.csv` those that are nearly
another one, in the same split or across splits; `outliers.csv` those least like any other;
`blank.csv` those of nothing. The columns are image, label, finding, score and like (the likelier
class, or the other image), the surest first. `audit.html` shows the images. Nothing is deleted:
`fit --data.leave_out=FILE` and `evaluate --leave_out=FILE` do without the images of such a list.

All other options are those of fit, for example `--data.root=photos --model.image_size=128`.
"""

from collections.abc import Sequence
from pathlib import Path

from cifar_transfer.base.errors import UserError
from cifar_transfer.base.files import LOGS
from cifar_transfer.base.text import program
from cifar_transfer.cli.features_cli import extract, parser
from cifar_transfer.features.audit import AuditedImages, find_all, summary
from cifar_transfer.features.audit_lists import PAGE, existing_list, write_lists
from cifar_transfer.network.contestant import parse_contestant

DEFAULT_FOLDER = Path(LOGS, "audit")


def main(args: Sequence[str]) -> None:
    """Parse the options, look at all images, and write what is found.

    Raises:
        UserError: A mistake in the options, or lists that an audit has written before.
    """
    options_parser = parser("audit", DEFAULT_FOLDER)
    options_parser.add_argument(
        "backbone",
        metavar="NAME[=WEIGHTS]",
        help="A backbone, with a name or a file of weights if not those of its library; a "
        "checkpoint will do.",
    )
    options, fit_options = options_parser.parse_known_args(args)
    written = existing_list(options.out)
    if written is not None:
        raise UserError(
            f"{written} is there already, and may have been edited: name another folder with --out."
        )
    extraction = extract(parse_contestant(options.backbone), options, fit_options, options.out)
    if not extraction.trainer.is_global_zero:
        return
    images = AuditedImages(extraction.data)
    results = find_all(images, extraction.features)
    write_lists(images, results, options.out)
    print(f"\n{summary(images, results)}")
    print(f"look at it   {options.out / PAGE}")
    print(
        f"do without   {program('fit')} --data.leave_out=FILE, once you have looked through that "
        f"file"
    )
