// Numbers, sizes and times as people read them.

export const NONE = "–";

const plain = new Intl.NumberFormat("en");

export function whole(value) {
  return value === null || value === undefined ? NONE : plain.format(Math.round(value));
}

/** 1263616 -> "1.26 M": three digits are enough to follow. */
export function short(value) {
  if (value === null || value === undefined) return NONE;
  for (const [limit, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e4, "k"]]) {
    if (Math.abs(value) >= limit) {
      const scaled = value / (unit === "k" ? 1e3 : limit);
      return `${scaled.toPrecision(scaled >= 100 ? 3 : 3).replace(/e.*/, "")} ${unit}`;
    }
  }
  return whole(value);
}

export function bytes(value) {
  if (!value) return value === 0 ? "0 B" : NONE;
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  const step = Math.min(units.length - 1, Math.floor(Math.log(value) / Math.log(1024)));
  return step ? `${(value / 1024 ** step).toFixed(1)} ${units[step]}` : `${value} B`;
}

export function loss(value) {
  return value === null || value === undefined ? NONE : value.toFixed(3);
}

export function percent(value) {
  return value === null || value === undefined ? NONE : `${(100 * value).toFixed(1)} %`;
}

export function seconds(value) {
  if (value < 10) return `${value.toFixed(1)} s`;
  if (value < 120) return `${Math.round(value)} s`;
  const minutes = Math.round(value / 60);
  if (minutes < 120) return `${minutes} min`;
  const hours = Math.round(value / 3600);
  return hours < 48 ? `${hours} h` : `${Math.round(value / 86400)} days`;
}

export function ago(at, now) {
  const passed = Math.max(0, now - at);
  return passed < 5 ? "now" : `${seconds(passed).replace(/\.\d/, "")} ago`;
}

export function clock(at, fine) {
  const options = { hour: "2-digit", minute: "2-digit", hourCycle: "h23" };
  if (fine) options.second = "2-digit";
  return new Date(at * 1000).toLocaleTimeString("en", options);
}

export function day(at) {
  return new Date(at * 1000).toLocaleDateString("en", { day: "numeric", month: "short" });
}
