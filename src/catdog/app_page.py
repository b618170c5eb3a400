"""The page of `catdog app`: the script that Streamlit runs anew whenever a visitor does something; not for import."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import streamlit as st

from catdog import app
from catdog.app import plain
from catdog.inputs import ImageFile
from catdog.names import IMAGE_SUFFIXES

ONE, MANY = "One picture", "Many pictures"
PICTURES_A_PAGE = 48
_CHUNK = 32  # pictures between two steps of the progress bar
_LISTED = 10  # of the files that show no picture
# Streamlit leaves a fifth of a phone's screen empty above the title.
_LOOK = "<style>.stMainBlockContainer { padding-top: 3rem; padding-bottom: 3rem; }</style>"
# Streamlit's uploader takes files from a dialog and by dropping; this hands it what is pasted, too.
_PASTE = """<script>
if (!window.catdogPastes) {
  window.catdogPastes = true;
  document.addEventListener("paste", (event) => {
    const input = document.querySelector('[data-testid="stFileUploader"] input[type="file"]');
    const pasted = [...event.clipboardData.files].filter((file) => file.type.startsWith("image/"));
    if (!input || !pasted.length) return;
    const files = new DataTransfer();
    (input.multiple ? pasted : pasted.slice(0, 1)).forEach((file) => files.items.add(file));
    input.files = files.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
    event.preventDefault();
  });
}
</script>"""


def show_page(settings: app.Settings) -> None:
    """Puts the page on the screen."""
    st.set_page_config(page_title="catdog", page_icon="🐾", layout="centered")
    load = st.cache_resource(app.load_assistant, show_spinner="Loading the model …")
    assistant: app.Assistant = load(Path(settings.model))
    info = assistant.classifier.info
    names = [plain(name) for name in info.class_names]
    question = f"{', '.join(names[:-1])} or {names[-1]}?"
    st.html(_LOOK)
    st.title(question[:1].upper() + question[1:] if len(names) <= app.BARS else f"Which of {len(names)} classes?")
    view = st.segmented_control(
        "View",
        [ONE, MANY],
        default=MANY if settings.folder else ONE,
        required=True,
        label_visibility="collapsed",
    )
    if view == ONE:
        _show_one(settings, assistant)
    else:
        _show_many(settings, assistant)
    st.html(_PASTE, unsafe_allow_javascript=True)
    st.divider()
    st.caption(
        f"**{plain(settings.model_name)}** answers. Network: {plain(info.backbone)}. "
        + (f"{settings.accuracy}. " if settings.accuracy else "")
        + "It calls every picture one of its classes, also a picture of something else."
    )
    if len(names) > app.BARS:
        with st.expander(f"Its {len(names)} classes"):
            st.write(", ".join(names))
    elif len(names) == 2 and info.threshold != 0.5:
        st.caption(f"A picture is called {names[1]} from a probability of {100 * info.threshold:.1f} % on.")


def _show_one(settings: app.Settings, assistant: app.Assistant) -> None:
    examples = st.cache_resource(_find_examples, show_spinner=False)(settings.root, settings.examples)
    sources = ["Upload", "Camera", *(["Examples"] if examples else [])]
    source = st.segmented_control(
        "Picture from", sources, default="Upload", required=True, label_visibility="collapsed"
    )
    if source == "Upload":
        upload = st.file_uploader("Drop a picture, choose one, or paste it", type=sorted(IMAGE_SUFFIXES), key="one")
        chosen = None if upload is None else app.Example(upload.name, "", upload.getvalue)
    elif source == "Camera":
        photo = st.camera_input("Take a picture")
        chosen = None if photo is None else app.Example("The photo", "", photo.getvalue)
    else:
        chosen = _choose_example(examples)
    if chosen is not None:
        _show_answer(assistant, chosen)


def _find_examples(root: str, folder: str) -> list[app.Example]:
    # The archives stay open for as long as the server runs: the pictures are read from them.
    return app.find_examples(Path(root) if root else None, Path(folder) if folder else None, contextlib.ExitStack())


def _choose_example(examples: Sequence[app.Example]) -> app.Example | None:
    shrink = st.cache_data(app.thumbnail, show_spinner=False)
    with st.container(horizontal=True, gap="small"):
        for number, example in enumerate(examples):
            with st.container(width=104, gap="small"):
                with contextlib.suppress(*app.UNREADABLE):
                    st.image(shrink(example.read()), width=104, alt=f"Example {number + 1}")
                if st.button(f"Try {number + 1}", key=f"example {number}", width="stretch"):
                    st.session_state.example = number
    number = st.session_state.get("example")
    return None if number is None else examples[number]


def _show_answer(assistant: app.Assistant, example: app.Example) -> None:
    look_at = st.cache_data(_look_at, max_entries=20, show_spinner="Looking …")
    try:
        look: app.Look = look_at(example.read(), assistant)
    except app.UNREADABLE as error:
        st.warning(f"{plain(example.name)} shows no picture: {plain(str(error))}. Please try another file.")
        return
    answer = look.answer
    st.subheader(f"{plain(answer.label)}, {app.percent(answer.probability)}", anchor=False)
    if example.label:
        st.caption(f"The data set says {plain(example.label)}{', too' if example.label == answer.label else ''}.")
    ranking = answer.ranking
    st.html(app.bars_html(ranking[: app.BARS], answer.label))
    if len(ranking) > app.BARS:
        with st.expander(f"The other {len(ranking) - app.BARS} classes"):
            st.html(app.bars_html(ranking[app.BARS :], answer.label))
    left, right = st.columns(2)
    left.image(look.picture, caption="The picture", width="stretch", alt="The picture")
    if look.evidence is not None:
        caption = f"What speaks for {plain(answer.label)} (Grad-CAM): the brighter, the more"
        right.image(look.evidence, caption=caption, width="stretch", alt=caption)


def _look_at(data: bytes, _assistant: app.Assistant) -> app.Look:
    """`app.look_at` with the arguments as Streamlit's cache wants them: the underscore says what is no part of it."""
    return app.look_at(_assistant, data)


def _show_many(settings: app.Settings, assistant: app.Assistant) -> None:
    files = _many_files(settings)
    answers = _judge(assistant, files)
    _tell_unreadable([(files[key].name, reason) for key, reason in answers.items() if isinstance(reason, str)])
    judged = [
        app.Judged(key, files[key].name, answer) for key, answer in answers.items() if isinstance(answer, app.Answer)
    ]
    if not judged:
        return
    counts = app.count_classes(judged)
    listed = ", ".join(f"{count:,} {plain(name)}" for name, count in counts.items())
    st.write(f"**{_count(len(judged), 'picture')}:** {listed}")
    with st.container(horizontal=True, vertical_alignment="center"):
        least_certain_first = st.toggle("Least certain first")
        kept = st.multiselect("Classes", list(counts), placeholder="All classes", label_visibility="collapsed")
    shown = [
        one
        for one in app.in_order(judged, least_certain_first=least_certain_first)
        if not kept or one.answer.label in kept
    ]
    place = st.container()
    pages = -(-len(shown) // PICTURES_A_PAGE)
    page = st.pagination(pages) if pages > 1 else 1
    part = shown[(page - 1) * PICTURES_A_PAGE : page * PICTURES_A_PAGE]
    shrink = st.cache_data(_thumbnail, max_entries=2000, show_spinner=False)
    thumbnails = {one.key: shrink(one.key, files[one.key]) for one in part}
    place.html(app.grid_html(part, thumbnails, headings=not least_certain_first))
    st.download_button("Download as CSV", app.format_csv(shown), "predictions.csv", "text/csv", on_click="ignore")


def _tell_unreadable(unreadable: Sequence[tuple[str, str]]) -> None:
    if unreadable:
        verb = "shows" if len(unreadable) == 1 else "show"
        listed = "".join(f"\n- {plain(name)}: {plain(reason)}" for name, reason in unreadable[:_LISTED])
        more = f"\n- and {len(unreadable) - _LISTED:,} more" if len(unreadable) > _LISTED else ""
        st.warning(f"{_count(len(unreadable), 'file')} {verb} no picture:\n{listed}{more}")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _thumbnail(key: str, _file: ImageFile) -> bytes:
    # A file that went away in the meantime leaves its place empty.
    with contextlib.suppress(*app.UNREADABLE):
        return app.thumbnail(_file.read())
    return b""


def _many_files(settings: app.Settings) -> dict[str, ImageFile]:
    """The pictures to sort, by keys of their own."""
    given = st.cache_resource(_open_folder, show_spinner=False)(settings.folder) if settings.folder else []
    uploads: list[Any] = st.file_uploader(
        "Drop pictures or a folder of them, choose some, or paste one",
        type=sorted(IMAGE_SUFFIXES),
        accept_multiple_files=True,
        key="many",
    )
    return {file.name: file for file in given} | {
        upload.file_id: ImageFile(upload.name, upload.getvalue) for upload in uploads
    }


def _open_folder(folder: str) -> list[ImageFile]:
    return app.find_pictures(Path(folder), contextlib.ExitStack())


def _judge(assistant: app.Assistant, files: Mapping[str, ImageFile]) -> dict[str, app.Answer | str]:
    """Answers for every file; those that this visitor's page does not know yet are classified, with a bar."""
    known: dict[str, app.Answer | str] = st.session_state.setdefault("answers", {})
    missing = [key for key in files if key not in known]
    if missing:
        bar = st.progress(0.0, "Looking …")
        for first in range(0, len(missing), _CHUNK):
            known |= app.judge(assistant.classifier, {key: files[key] for key in missing[first : first + _CHUNK]})
            done = min(first + _CHUNK, len(missing))
            bar.progress(done / len(missing), f"Looking … {done:,} of {len(missing):,}")
        bar.empty()
    return {key: known[key] for key in files}


if __name__ == "__main__":
    # Streamlit puts this file's folder on Python's path, where its modules would stand for others of their names.
    with contextlib.suppress(ValueError):
        sys.path.remove(str(Path(__file__).parent))
    show_page(app.Settings(**json.loads(sys.argv[1])))
