// Pictures dropped anywhere on the page, or pasted, go the way of chosen ones.
const take = (event, data) => {
  const files = [...(data?.files ?? [])];
  if (files.length) {
    event.preventDefault();
    getElement(uploader).$refs.qRef.addFiles(files);
  }
};
document.addEventListener("paste", (event) => take(event, event.clipboardData));
document.addEventListener("drop", (event) => take(event, event.dataTransfer));
document.addEventListener("dragover", (event) => event.preventDefault());
