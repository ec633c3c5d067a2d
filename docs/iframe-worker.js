// Search without a server: a browser starts no Worker from a file, so the worker's script runs in a
// hidden frame instead, with the few names of a Worker that it uses.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.appendChild(frame);
      this.frame = frame;
      const scope = frame.contentWindow;
      scope.document.open();
      scope.document.write(`<html><body><script>
        postMessage = data => parent.postMessage(data, "*");
        importScripts = (...urls) => urls.reduce((before, url) => before.then(() =>
          new Promise(loaded => {
            const script = document.createElement("script");
            script.src = url;
            script.onload = loaded;
            document.body.appendChild(script);
          })), Promise.resolve());
      <\/script><script src="${url}"><\/script></body></html>`);
      scope.document.close();
      this.ready = new Promise(resolve => { scope.onload = resolve; });
      window.addEventListener("message", event => {
        if (event.source === scope) {
          this.dispatchEvent(new MessageEvent("message", { data: event.data }));
          if (this.onmessage) this.onmessage(event);
        }
      });
    }
    postMessage(data) {
      this.ready.then(() =>
        this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
    }
    terminate() {
      this.frame.remove();
    }
  };
}
