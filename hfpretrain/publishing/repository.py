"""The Hub: what a repo has, one immutable revision a checkpoint, the export on `main`, a state to go on from.

The token is huggingface_hub's own business: it is read there at each request, and nothing here touches it.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfpretrain import files
from hfpretrain.recipe.hub import NotPushableError


class Repo:
    """A model repo, created by the first call that needs it.

    Methods raise the errors of huggingface_hub; `recipe.hub.explain` says what they mean.
    """

    def __init__(self, repo_id: str, private: bool):
        from huggingface_hub import HfApi

        self._api, self._asked, self._private = HfApi(), repo_id, private
        self._repo_id: str | None = None

    def open(self) -> str:
        """Make the repo where there is none; its full name."""
        if self._repo_id is None:
            self._repo_id = self._api.create_repo(self._asked, private=self._private, exist_ok=True).repo_id
        return self._repo_id

    def tags(self) -> set[str]:
        """Names of the revisions that are whole."""
        return set(self._refs()[0])

    def revision(self, name: str, title: str, file: str) -> str | None:
        """The commit of a pushed revision with this title, None if it is not there, or not whole.

        Raises `NotPushableError` if what is there is something else, or has no `file`: it must never be replaced.
        """
        tags, branches = self._refs()
        if name in tags or name in branches:
            commit = tags.get(name) or branches[name]
            (newest, *older) = self._api.list_repo_commits(self.open(), revision=commit)
            wrong = None
            if newest.title != title and (name in tags or older):  # else a branch that is still as it was made
                wrong = f"another {name} ({newest.title!r})"
            elif name in tags and not self._api.file_exists(self.open(), file, revision=commit):
                wrong = f"{name} without {file}"
            if wrong is not None:
                raise NotPushableError(f"{self.open()} has {wrong}; push to a repo of its own")
            return commit if name in tags else None
        return None

    def push_revision(self, name: str, title: str, description: str, files: Mapping[str, Path]) -> str:
        """One commit on a branch `name` that holds `files` by their path in the repo, and a tag `name` on that commit.

        Stopped anywhere and called again, it does what is missing. The branch begins at the repo's first commit, so
        that nothing of `main` is in it. Branch and tag are of one name, as the commit they point to is the same:
        git, and `from_pretrained` with it, may take either. Returns the commit.
        """
        from huggingface_hub import CommitOperationAdd
        from huggingface_hub.errors import HfHubHTTPError

        repo_id, (_, branches) = self.open(), self._refs()
        if name not in branches:
            first = self._api.list_repo_commits(repo_id)[-1].commit_id
            self._api.create_branch(repo_id, branch=name, revision=first, exist_ok=True)
        (newest, *_) = self._api.list_repo_commits(repo_id, revision=branches.get(name, name))
        commit = str(newest.commit_id)
        if newest.title != title:
            operations = [CommitOperationAdd(path, local) for path, local in sorted(files.items())]
            keywords: dict[str, Any] = {"revision": name, "commit_description": description}
            commit = self._api.create_commit(repo_id, operations, commit_message=title, **keywords).oid
        try:
            self._api.create_tag(repo_id, tag=name, revision=commit, tag_message=title)
        except HfHubHTTPError as error:
            # It may be there by an answer that was lost; if not, the branch has the name for itself alone.
            if error.response.status_code != 409 or self._refs()[0].get(name, commit) != commit:
                raise
        return commit

    def push_main(self, folder: Path) -> str:
        """Upload the files of a folder that `main` lacks, and delete those of an earlier export that are not in it;
        returns the newest commit. Raises `NotPushableError` if a file of the export is damaged."""
        from safetensors import SafetensorError, safe_open

        repo_id = self.open()
        if (reason := files.sums_damage(folder)) is not None:
            raise NotPushableError(reason)
        for path in folder.glob("*.safetensors"):
            try:
                with safe_open(path, framework="np"):
                    pass
            except SafetensorError as error:
                raise NotPushableError(f"{path} is damaged: {error}") from error
        old = [glob.escape(name) for name in self._exported() if not (folder / name).is_file()]
        keywords: dict[str, Any] = {"delete_patterns": old, "ignore_patterns": [f"*{files.INCOMPLETE}"]}
        return str(
            self._api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=_MESSAGE, **keywords).oid
        )

    def _exported(self) -> list[str]:
        """Files on `main` that an export put there, by its list of checksums; else the weights at the top."""
        names = self._api.list_repo_files(self.open())
        if files.SUMS in names:
            path = Path(self._api.hf_hub_download(self.open(), files.SUMS, force_download=True))
            try:
                return [name for name in files.sums_of(path.parent) or {} if name in names]
            except ValueError:
                return []
        return [name for name in names if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", name)]

    def card(self) -> str | None:
        """The card on `main`, None where there is none."""
        from huggingface_hub.errors import EntryNotFoundError

        try:
            path = self._api.hf_hub_download(self.open(), "README.md", force_download=True)
        except EntryNotFoundError:
            return None
        return Path(path).read_text(encoding="utf-8")

    def _refs(self) -> tuple[dict[str, str], dict[str, str]]:
        refs = self._api.list_repo_refs(self.open())
        tags, branches = ({ref.name: ref.target_commit for ref in kind} for kind in (refs.tags, refs.branches))
        return tags, branches


_MESSAGE = "Upload from hfpretrain"
