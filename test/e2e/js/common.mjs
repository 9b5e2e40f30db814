// What the suites share. The platform to test is named by the variables that
// E2B's SDK reads itself; MODE says which of the two ways it is reached:
// "plain" (http, two URL variables) or "tls" (domain mode).
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'

export const mode = process.env.MODE
if (mode !== 'plain' && mode !== 'tls') throw new Error('MODE must be plain or tls')

/** Text of a program in the testdata directory, to run in a sandbox. */
export const testdata = (name) => readFileSync(join(process.env.TESTDATA, name), 'utf8')

/** Base URL of a port of the sandbox, as a person would open it in a browser. */
export const origin = (sandbox, port) =>
  `${mode === 'tls' ? 'https' : 'http'}://${sandbox.getHost(port)}`

/** The same for a WebSocket. */
export const wsOrigin = (sandbox, port) =>
  `${mode === 'tls' ? 'wss' : 'ws'}://${sandbox.getHost(port)}`

/** Headers that route a bare URL to the sandbox when it does not name it. */
export const routing = (sandbox, port = 49983) => ({
  'E2b-Sandbox-Id': sandbox.sandboxId,
  'E2b-Sandbox-Port': String(port),
})

/** How much longer everything takes in a sandbox whose processor is emulated. */
export const SLOWER = Number(process.env.SLOWER ?? 1)

/** Whether root may do in a sandbox what it likes, because it has a kernel of its own. */
export const OWN_KERNEL = process.env.OWN_KERNEL === '1'

/** Calls check until it gives something other than undefined, and returns that. */
export async function eventually(what, check, ms = 15_000) {
  ms *= SLOWER
  const end = Date.now() + ms
  let last
  for (;;) {
    try {
      const got = await check()
      if (got !== undefined && got !== false) return got
      last = undefined
    } catch (err) {
      last = err
    }
    if (Date.now() > end) throw new Error(`${what}: not within ${ms} ms`, { cause: last })
    await delay(50)
  }
}

/** A promise that others resolve, and that fails when nobody does in time. */
export function signal(what, ms = 15_000) {
  ms *= SLOWER
  let resolve, reject
  const done = new Promise((a, b) => ([resolve, reject] = [a, b]))
  const timer = setTimeout(() => reject(new Error(`${what}: not within ${ms} ms`)), ms)
  done.catch(() => {}).finally(() => clearTimeout(timer))
  return { done, resolve, reject }
}

/** Collects text and tells when a part of it has arrived. */
export class Transcript {
  text = ''
  #decoder = new TextDecoder()
  add = (data) => {
    this.text += typeof data === 'string' ? data : this.#decoder.decode(data, { stream: true })
  }
  has = (part, ms) =>
    eventually(`output has ${JSON.stringify(part)} (got ${JSON.stringify(this.text.slice(-500))})`, () => this.text.includes(part), ms)
}
