// Headless Chromium, for the scripts that look at applications as a person does.
import assert from 'node:assert/strict'
import { createHash, X509Certificate } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { after, before, it } from 'node:test'
import { chromium } from 'playwright-core'

/** Addresses by application and form. */
export const addresses = JSON.parse(process.env.ADDRESSES)

// The platform's certificate, and no other, is good although nobody known signed it.
const certificate = new X509Certificate(readFileSync(process.env.CERTIFICATE))
const key = createHash('sha256').update(certificate.publicKey.export({ type: 'spki', format: 'der' })).digest('base64')

let browser
before(async () => {
  browser = await chromium.launch({
    executablePath: process.env.CHROMIUM,
    args: ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
      '--disable-component-update', '--disable-sync', `--ignore-certificate-errors-spki-list=${key}`],
  })
})
after(async () => { await browser?.close() })

/**
 * Runs a case once in each form of an application. It gets a fresh page, the
 * address and a diary of what the page did, which a failure prints. The browser
 * must stay with the application's origin throughout.
 */
export function inEachForm(application, what, run, forms = Object.keys(addresses[application])) {
  for (const form of forms) {
    it(`${what}, in the form ${form}`, async () => {
      const address = addresses[application][form]
      const context = await browser.newContext()
      const page = await context.newPage()
      const diary = keepDiary(page)
      try {
        await run(page, address, diary)
        const origin = new URL(address).origin.replace(/^http/, '')
        for (const url of diary.requested) {
          assert.equal(new URL(url).origin.replace(/^(http|ws)/, ''), origin, `it asked for ${url}`)
        }
      } catch (err) {
        // Without the colours that a report cannot hold.
        throw new Error(`${err.stack}\nThe page ${page.url()} did:\n${diary.join('\n')}`.replace(/\x1b\[\d*m/g, ''))
      } finally {
        await context.close()
      }
    })
  }
}

function keepDiary(page) {
  const diary = []
  diary.requested = []
  diary.loads = 0
  page.on('request', (request) => {
    if (/^(http|ws)/.test(request.url())) diary.requested.push(request.url())
    if (request.isNavigationRequest()) diary.loads++
  })
  page.on('response', (response) => diary.push(`${response.status()} ${response.url()}`))
  page.on('requestfailed', (request) => diary.push(`failed ${request.url()}: ${request.failure()?.errorText}`))
  page.on('console', (message) => diary.push(`console ${message.type()}: ${message.text()}`))
  page.on('pageerror', (err) => diary.push(`error: ${err.message}`))
  page.on('websocket', (socket) => {
    diary.requested.push(socket.url())
    diary.push(`WebSocket ${socket.url()}`)
    socket.on('framereceived', ({ payload }) => diary.push(`WebSocket got ${String(payload).slice(0, 200)}`))
    socket.on('socketerror', (err) => diary.push(`WebSocket error: ${err}`))
    socket.on('close', () => diary.push('WebSocket closed'))
  })
  return diary
}

/** Protocol by which the page itself came, as the browser names it: h2 or http/1.1. */
export const protocol = (page) => page.evaluate(() => performance.getEntriesByType('navigation')[0].nextHopProtocol)
