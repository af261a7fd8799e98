// Without a clipboard, or without scripts, the button stays hidden and the text can still be selected.
const button = document.getElementById("copy"), text = document.getElementById("snippet").textContent;
button.hidden = !navigator.clipboard;
button.onclick = () => navigator.clipboard.writeText(text).then(() => { button.textContent = "Copied"; });
