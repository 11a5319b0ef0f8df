// The map of the KV blocks: one square each, or one for several neighbours where there are many.

const STATES = ["free", "cached", "used", "shared"];

export class BlockMap {
  #canvas = document.getElementById("blocks");
  #states = new Uint8Array();
  #numBlocks = 0;

  constructor() {
    new ResizeObserver(() => this.#draw()).observe(this.#canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#draw());
  }

  build({ num_blocks, block_size }) {
    this.#numBlocks = num_blocks;
    this.scale = document.getElementById("blocks-scale");
    this.blockSize = block_size;
    this.#states = new Uint8Array();
  }

  show({ used, cached, map }) {
    if (map) {
      this.#states = Uint8Array.from(atob(map), (character) => character.charCodeAt(0));
      const each = Math.ceil(this.#numBlocks / this.#states.length);
      this.scale.textContent = `a square is ${each === 1 ? "a block" : `${each} blocks`} of ${this.blockSize} tokens`;
      const shared = this.#states.filter((state) => state === 3).length;
      this.#count("shared", each === 1 ? shared : "");
      this.#draw();
    }
    this.#count("used", used);
    this.#count("cached", cached);
    this.#count("free", this.#numBlocks - used - cached);
    const label = `KV cache: ${used} blocks used, ${cached} cached, ${this.#numBlocks - used - cached} free`;
    this.#canvas.setAttribute("aria-label", label);
  }

  #count(state, number) {
    document.querySelector(`[data-count="${state}"]`).textContent = number.toLocaleString("en");
  }

  #draw() {
    const { clientWidth: width, clientHeight: height } = this.#canvas;
    const count = this.#states.length;
    if (count === 0 || width === 0) return;
    const ratio = devicePixelRatio;
    this.#canvas.width = width * ratio;
    this.#canvas.height = height * ratio;
    const context = this.#canvas.getContext("2d");
    context.scale(ratio, ratio);
    // The largest squares that all fit.
    let columns = Math.ceil(Math.sqrt((count * width) / height));
    while (Math.ceil(count / columns) * (width / columns) > height) columns += 1;
    const pitch = width / columns;
    const gap = Math.min(2, pitch * 0.18);
    const style = getComputedStyle(document.documentElement);
    STATES.forEach((state, code) => {
      context.fillStyle = style.getPropertyValue(`--${state}`);
      context.beginPath();
      this.#states.forEach((each, cell) => {
        if (each !== code) return;
        const x = (cell % columns) * pitch;
        const y = Math.floor(cell / columns) * pitch;
        context.roundRect(x, y, pitch - gap, pitch - gap, pitch * 0.22);
      });
      context.fill();
    });
  }
}
