// Copy buttons. Pages that are opened as files may have no clipboard: then the text is marked.
document.addEventListener("click", (event) => {
  const button = event.target.closest("button.copy");
  if (!button) return;
  const code = button.parentElement.querySelector("code");
  const done = (text) => {
    button.textContent = text;
    setTimeout(() => { button.textContent = "copy"; }, 1500);
  };
  const mark = () => {
    const range = document.createRange();
    range.selectNodeContents(code);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    try { done(document.execCommand("copy") ? "copied" : "marked"); } catch { done("marked"); }
  };
  if (!navigator.clipboard) mark();
  else navigator.clipboard.writeText(code.textContent).then(() => done("copied"), mark);
});
