"""Train several variants of a character model with several seeds each, and compare them.

    python recipes/study_character.py --study recipes/study_normalization.yaml

The same as `saereg compare STUDY.yaml --output_dir DIR`: see `hf_saereg/commands/compare.py`.
"""

from hf_saereg.commands.compare import main
from hf_saereg.errors import one_sentence_errors

if __name__ == "__main__":
    with one_sentence_errors():
        main()
