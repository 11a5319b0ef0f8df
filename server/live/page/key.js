// The viewer's key, on a server that wants one. It lives as long as the tab.

const NAME = "carousel-key";
const form = document.getElementById("key-form");
const field = document.getElementById("key");
const change = document.getElementById("change-key");

export const authorization = () => {
  const key = sessionStorage.getItem(NAME);
  return key ? { Authorization: `Bearer ${key}` } : {};
};

export const hasKey = () => sessionStorage.getItem(NAME) !== null;

/** Show the form until a key is given; `problem` says why the one before was refused. */
export function askForKey(problem) {
  form.hidden = false;
  change.hidden = true;
  if (problem) document.getElementById("key-hint").textContent = problem;
  field.focus();
  return new Promise((resolve) => {
    form.onsubmit = (event) => {
      event.preventDefault();
      if (!field.value.trim()) return;
      sessionStorage.setItem(NAME, field.value.trim());
      field.value = "";
      form.hidden = true;
      change.hidden = false;
      resolve();
    };
  });
}

/** Call `changed` when the viewer wants to give another key. */
export function onChangeOfKey(changed) {
  change.hidden = !hasKey();
  change.onclick = () => {
    sessionStorage.removeItem(NAME);
    changed();
  };
}
