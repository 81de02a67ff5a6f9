"""ImageNet classes that stand for the classes of another data set, chosen by name alone.

They make a network with an ImageNet head a zero-shot classifier of the other data set. Unlike CLIP,
it cannot read a new name.
"""

from collections.abc import Mapping, Sequence

import numpy as np

# Numbers and inclusive ranges of ImageNet-1k's classes. It has no coins or planets; their entries
# are classes that are as round, or fly as high.
STAMPS: dict[str, str] = {
    "birds": "7-24 80-100 127-146",
    "insects": "69-79 300-326",
    "mammals": "101-106 147-299 330-388",
    "hats": "433 439 452 515 518 560 667 715 793 808",
    "fruit": "948-957 989",
    "vegetables": "936-947 987 991-997",
    "dishes": (
        "440 441 499 503 504 505 521 544 550 567 572 618 647 653 659 666 725 737 738 773 809 "
        "813 849 898 899 901 907 909 910 923 967 968"
    ),
    "tools": "462 473 477 491 512 587 596 623 676 677 696 714 726 730 731 740 783 784 792",
    "flowers": "723 883 984-986",
    "space": "417 657 744 755 807 812 971",
    "money": "409 455 480 635 685 719 771 800 826 893",
    "houses": (
        "410 425 437 448 449 460 483 497 498 500 538 580 624 660 663 668 672 698 706 727 743 "
        "762 832 853 858 900 915"
    ),
    "roadsigns": "704 733 863 919 920",
    "vehicles": (
        "403 404 405 407 408 436 444 450 466 468 472 479 484 510 511 517 547 554 555 561 565 "
        "569 573 575 576 586 595 603 609 612 621 625 627 628 654 656 661 665 670 671 675 690 "
        "705 717 734 751 757 779 780 802 803 814 817 820 829 833 847 864 866 867 870 871 874 "
        "880 895 914"
    ),
}

FASHION: dict[str, str] = {
    "T-shirt/top": "610",
    "Trouser": "608",
    "Pullover": "841",
    "Dress": "578 601 689 775",
    "Coat": "568 617 735 869",
    "Sandal": "774",
    "Shirt": "474 697 834",
    "Sneaker": "770",
    "Bag": "414 636 728 748",
    "Ankle boot": "514 630",
}

# Faces, symbols and flags have hardly any classes of their own.
EMOJI: dict[str, str] = {
    "Activities": "416 422 429 430 522 543 560 574 702 722 746 747 752 768 795 801 805 852 890",
    "Animals & Nature": "0-397 984-986 988 990-996",
    "Flags": "557",
    "Food & Drink": "440 441 504 505 572 849 898 899 907 923-969 987 998",
    "Objects": (
        "401 402 409 414 418 432 435 470 486 487 508 515 527 528 530 531 541 546 558 563 566 579 "
        "587 590 591 593 594 604 605 608 610 620 636 637 664 673 677 695 707 732 742 748 749 754 "
        "759 770 774 776 783 784 826 834 837 845 848 851 861 875 889 906 921 999"
    ),
    "People & Body": "981-983",
    "Smileys & Emotion": "643",
    "Symbols": "916 918-920",
    "Travel & Places": f"{STAMPS['houses']} {STAMPS['vehicles']} 970-980",
}


def ids_of(table: Mapping[str, str], class_names: Sequence[str]) -> list[np.ndarray]:
    """ImageNet classes of every name, in the order of the names.

    Raises:
        ValueError: A name is not in the table.
    """
    unknown = [name for name in class_names if name not in table]
    if unknown:
        raise ValueError(f"class_names: no ImageNet classes are known for {unknown[0]!r}")
    return [np.unique(np.concatenate([_span(s) for s in table[n].split()])) for n in class_names]


def _span(text: str) -> np.ndarray:
    first, _, last = text.partition("-")
    return np.arange(int(first), int(last or first) + 1)
