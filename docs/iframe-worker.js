/* Browsers start no Worker for a page that was opened from a folder. There, the search's script runs in a hidden frame instead. */
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(script) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      this.ready = new Promise((loaded) => {
        document.documentElement.append(frame);
        this.scope = frame.contentWindow;
        this.scope.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
        const tag = this.scope.document.createElement("script");
        tag.src = script;
        tag.onload = loaded;
        this.scope.document.body.append(tag);
      });
    }

    postMessage(data) {
      this.ready.then(() => this.scope.dispatchEvent(new MessageEvent("message", { data })));
    }
  };
}
